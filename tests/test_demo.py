"""The demo, a few steps of everything, with the shipped models; and what those models are."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from videorepa.demo import demo
from videorepa.system.hub import micro_weights


def test_the_quick_demo_leaves_a_report_scores_and_an_export(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = demo(tmp_path, quick=True)
    said = capsys.readouterr().out
    assert "It cannot show a gain: 5 clips" in said and "docs/answer.md" in said
    text = page.read_text(encoding="utf-8")
    assert text.count(' data-clip="') == 15 and "data:video/mp4;base64" in text
    for name in ("base", "control", "aligned"):
        summary = json.loads(
            (tmp_path / "generated" / name / "scores" / "summary.json").read_text()
        )
        assert summary["metrics"]["joint"]["n"] == 5 and not summary["failures"]
    stock = tmp_path / "exported" / "transformer"
    assert sorted(p.name for p in stock.iterdir()) == [
        "config.json",
        "diffusion_pytorch_model.safetensors",
    ]
    seeds = [
        [
            json.loads(p.read_text())["seed"]
            for p in sorted((tmp_path / "generated" / n).glob("*-0.json"))
        ]
        for n in ("base", "control", "aligned")
    ]
    assert seeds[0] == seeds[1] == seeds[2] and len(set(seeds[0])) == 5


def test_shipped_weights_are_small_and_in_ordinary_folders() -> None:
    from diffusers import CogVideoXPipeline
    from transformers import Dinov2Model, VideoMAEModel

    root = micro_weights("cogvideox").parent
    sizes = {path: path.stat().st_size for path in root.rglob("*") if path.is_file()}
    assert sizes.pop(micro_weights("cogvideox-i2v.safetensors")) < 4e6
    assert sum(sizes.values()) < 25e6
    pipeline = CogVideoXPipeline.from_pretrained(root / "cogvideox")
    teacher = VideoMAEModel.from_pretrained(root / "videomae")
    image_teacher = Dinov2Model.from_pretrained(root / "dinov2")
    assert pipeline.transformer.config.num_layers == 6
    assert (teacher.config.num_frames, teacher.config.num_hidden_layers) == (16, 4)
    assert image_teacher.config.image_size == 64


def test_the_base_model_draws_moving_balls_of_the_named_colour() -> None:
    """Not a matter of taste: coloured pixels of the named hue are there, and move."""
    import torch

    from videorepa.backbones._sampler import Sampler, encode_prompts, noise_seed
    from videorepa.backbones.cogvideox import CogVideoX
    from videorepa.benchmarks.laws.tracking import observe
    from videorepa.settings.sections import Generation

    spec = CogVideoX(weights="micro")
    cpu = torch.device("cpu")
    settings = Generation(steps=20, guidance_scale=4.0)
    prompts = {c: f"A {c} ball rolls to the right." for c in ("red", "blue", "green")}
    texts = encode_prompts(spec.load(("text_encoder",), cpu), prompts.values(), settings)
    backbone = spec.load(("transformer", "vae"), cpu)
    sampler = Sampler(backbone, spec.default_size(), settings, texts)
    found = 0
    for colour, prompt in prompts.items():
        frames = sampler.sample(prompt, noise_seed(prompt, 0))
        track = observe(frames).tracks.get(colour)
        if track is None or track.visible.sum() < 9:
            continue
        x = track.position[track.visible, 0]
        found += np.nanmax(x) - np.nanmin(x) > 8
    if found < 2:
        pytest.fail(f"only {found} of 3 clips show a moving ball of the named colour")
