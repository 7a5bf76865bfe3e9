"""VBench's stock dimensions: values by hand, plain restatements on tiny random weights, and what
does not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer, ViTConfig, ViTModel

from videorepa.benchmarks.vbench import (
    ALWAYS,
    MOTION,
    VBench,
    consistency,
    dino_features,
    flickering,
    for_clip,
    for_dino,
    for_style,
    is_dynamic,
)
from videorepa.data.video import write_video
from videorepa.errors import ClipError, UserError
from videorepa.evaluate import evaluate

pytest.importorskip("skimage", reason="scikit-image is not installed: no optical flow")

# Values by hand.


def test_consistency_is_the_mean_likeness_to_the_last_and_the_first_frame() -> None:
    features = torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, 1.0], [-1.0, 0.0]])
    half = 0.5**0.5
    expected = [(half + half) / 2, (half + 0) / 2, (0 + 0) / 2]  # The last cosine is -1: 0.
    assert consistency(features) == pytest.approx(np.mean(expected))
    assert consistency(features[:1].repeat(5, 1)) == pytest.approx(1)


def test_flickering_is_the_distance_of_neighbours() -> None:
    frames = np.zeros((3, 4, 4, 3), np.uint8)
    frames[1] = 51  # As far up as down again, which whole numbers of 8 bits would wrap.
    assert flickering(frames) == pytest.approx((255 - 51) / 255)
    assert flickering(frames[:1].repeat(4, 0)) == 1


def test_frames_are_resized_as_published() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (1, 240, 360, 3), np.uint8)
    assert for_dino(frames).shape == (1, 3, 224, 336), "whole: no crop"
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    wide = F.interpolate(video, (224, 336), mode="bicubic", align_corners=False)[..., 56:280]
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    expected = (wide / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    assert torch.allclose(for_clip(frames), expected, atol=1e-5)
    tall = for_dino(frames.transpose(0, 2, 1, 3))
    assert tall.shape == (1, 3, 336, 224)
    # For appearance style, as images: with antialias, and in whole levels.
    frames = np.random.default_rng(0).integers(64, 192, (1, 480, 720, 3), np.uint8)
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
    smooth = F.interpolate(video, (224, 336), mode="bicubic", antialias=True)[..., 56:280]
    levels = torch.tensor(std).view(3, 1, 1) * for_style(frames) + torch.tensor(mean).view(3, 1, 1)
    assert (255 * levels - smooth).abs().max() < 1.5
    assert (for_style(frames) - for_clip(frames)).abs().mean() > 0.2


# Tiny models.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DINO and two CLIPs with random weights, and LAION's linear layer."""
    root = tmp_path_factory.mktemp("vbench")
    torch.manual_seed(0)
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    dino = ViTModel(ViTConfig(hidden_size=16, image_size=224, patch_size=16, **sizes))
    words = {chr(c): n for n, c in enumerate(range(ord("a"), ord("z") + 1))}
    vocabulary = words | {f"{letter}</w>": 26 + n for letter, n in words.items()}
    vocabulary |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    ends = {"bos_token_id": 52, "eos_token_id": 53, "pad_token_id": 53}
    text = {"hidden_size": 16, "vocab_size": 54, "max_position_embeddings": 77, **sizes, **ends}
    for name in ("clip_b", "clip_l"):
        vision = {"hidden_size": 16, "image_size": 224, "patch_size": 32, **sizes}
        clip = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
        save(clip, root / name)
        CLIPTokenizer(vocab=vocabulary, merges=[]).save_pretrained(root / name)
    save(dino, root / "dino")
    torch.save({"weight": torch.randn(1, 12), "bias": torch.randn(1)}, root / "linear.pth")
    return root


def save(model: Any, folder: Path) -> None:
    for value in model.parameters():
        torch.nn.init.normal_(value)
    model.save_pretrained(folder)


def settings(models: Path) -> list[str]:
    folders = [f"{name}={models / name}" for name in ("dino", "clip_b", "clip_l")]
    return [*folders, f"aesthetic={models / 'linear.pth'}", "precision=float32"]


def bench(models: Path, *more: str) -> VBench:
    return VBench.from_settings([*settings(models), *more], "vbench")


def film(speed: float = 3.0, frames: int = 6, seed: int = 0) -> np.ndarray:
    """Noise in blocks that slides."""
    picture = np.random.default_rng(seed).integers(0, 256, (8, 12, 3), np.uint8)
    picture = picture.repeat(8, 0).repeat(8, 1)
    return np.stack([np.roll(picture, round(speed * n), 1) for n in range(frames)])


def cubic(x: np.ndarray) -> np.ndarray:
    x, a = np.abs(x), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    return np.where(x <= 1, near, np.where(x < 2, a * (x**3 - 5 * x**2 + 8 * x - 4), 0))


def stretched(table: np.ndarray, size: int, axis: int) -> np.ndarray:
    """One axis of 14 places stretched to `size` by (size + 0.1) / 14, with clamped ends."""
    places = (np.arange(size) + 0.5) / ((size + 0.1) / 14) - 0.5
    weights = np.zeros((size, 14))
    for row, place in enumerate(places):
        for tap in range(int(np.floor(place)) - 1, int(np.floor(place)) + 3):
            weights[row, min(max(tap, 0), 13)] += cubic(np.array(place - tap))
    return np.moveaxis(np.tensordot(weights, table, (1, axis)), 0, axis)


def test_dinos_positions_are_stretched_as_in_the_original_code(models: Path) -> None:
    live = bench(models)._dino
    assert live.layernorm.eps == 1e-6
    square, wide = torch.randn(2, 3, 224, 224), torch.randn(1, 3, 224, 336)
    with torch.no_grad():
        stock = live(square).last_hidden_state[:, 0]
        assert torch.allclose(dino_features(live, square), stock, atol=1e-5)
        ours = dino_features(live, wide)
        # Put the plain restatement's table of 14 x 21 places into a stock model of that size.
        table = live.embeddings.position_embeddings[0].double().numpy()
        grid = stretched(stretched(table[1:].reshape(14, 14, -1), 14, 0), 21, 1)
        places = np.concatenate([table[:1], grid.reshape(14 * 21, -1)])
        shape = live.config.to_dict() | {"image_size": (224, 336)}
        other = ViTModel(ViTConfig(**shape), add_pooling_layer=False).eval()
        weights = {k: v for k, v in live.state_dict().items() if not k.startswith("pooler.")}
        weights["embeddings.position_embeddings"] = torch.from_numpy(places)[None].float()
        other.load_state_dict(weights)
        restated = (ours - other(wide).last_hidden_state[:, 0]).norm() / ours.norm()
        stock = (ours - live(wide, interpolate_pos_encoding=True).last_hidden_state[:, 0]).norm()
        assert restated < 1e-5 and stock / ours.norm() > 1e-4, (restated, stock / ours.norm())


def prompt_list(path: Path) -> Path:
    entries = [
        {"prompt_en": "a cat", "dimension": ["subject_consistency", "motion_smoothness"]},
        {
            "prompt_en": "a dog, Van Gogh style",
            "dimension": ["appearance_style"],
            "auxiliary_info": {"appearance_style": "van gogh"},
        },
        {"prompt_en": "a cat", "dimension": ["temporal_flickering"]},
        {"prompt_en": "a bird", "dimension": ["scene"]},
    ]
    path.write_text(json.dumps(entries))
    return path


def test_a_clips_values_are_those_of_plain_restatements(models: Path, tmp_path: Path) -> None:
    frames = film()
    row = bench(models).score(frames, "anything")
    assert row.keys() == {*ALWAYS, MOTION, "invalid"} and not row["invalid"]
    load = lambda name: CLIPModel.from_pretrained(models / name).eval()  # noqa: E731
    clip, large = load("clip_b"), load("clip_l")
    linear = torch.load(models / "linear.pth")
    with torch.no_grad():
        pooled = clip.vision_model(for_clip(frames)).pooler_output
        seen = clip.visual_projection(pooled)
        assert row["background_consistency"] == pytest.approx(consistency(seen), abs=1e-5)
        pooled = large.vision_model(for_clip(frames)).pooler_output
        unit = F.normalize(large.visual_projection(pooled), dim=-1)
        scores = (unit @ linear["weight"].T + linear["bias"]) / 10
        assert row["aesthetic_quality"] == pytest.approx(float(scores.mean()), abs=1e-5)
        # "van gogh" letter by letter, each word's last letter with the mark of an end.
        ids = [52, *(ord(c) - 97 for c in "va"), 26 + ord("n") - 97]
        ids += [*(ord(c) - 97 for c in "gog"), 26 + ord("h") - 97, 53]
        text = clip.text_projection(clip.text_model(torch.tensor([ids])).pooler_output)
        pooled = clip.vision_model(for_style(frames)).pooler_output
        style = F.cosine_similarity(clip.visual_projection(pooled), text).mean()
    styled = bench(models, f"prompt_list={prompt_list(tmp_path / 'list.json')}")
    row = styled.score(frames, "a dog, Van Gogh style")
    assert row.keys() == {"appearance_style", MOTION, "invalid"}
    assert row["appearance_style"] == pytest.approx(float(style), abs=1e-5)


def test_a_still_clip_is_best_and_does_not_move(models: Path) -> None:
    still, moving = film(0.0), film(4.0)
    rows = [bench(models).score(frames, "") for frames in (still, moving)]
    for key in ("subject_consistency", "background_consistency", "temporal_flickering"):
        assert rows[0][key] == pytest.approx(1) and rows[1][key] < 0.999
    assert [row[MOTION] for row in rows] == [False, True]
    assert not is_dynamic(film(0.5)), "half a pixel of 64 is less than 1.5"


# Folders.


def clips(folder: Path, seed: int, prompts: tuple[str, ...] = ("a cat", "a dog")) -> Path:
    folder.mkdir()
    for number, prompt in enumerate(prompts):
        for k in range(2):
            write_video(folder / f"{prompt}-{k}.mp4", film(2.0 * k, 4, seed + number), 8)
    return folder


def test_dimensions_are_counted_over_the_clips_they_are_measured_of(
    models: Path, tmp_path: Path
) -> None:
    listed = f"prompt_list={prompt_list(tmp_path / 'list.json')}"
    a = clips(tmp_path / "a", 0, ("a cat", "a fox"))
    evaluation = evaluate("vbench", a, settings=[*settings(models), listed])
    summary = evaluation.summary
    assert summary.metrics.keys() == {"subject_consistency", "temporal_flickering", MOTION}
    assert summary.metrics["temporal_flickering"].n == 2
    assert [m["prompt"] for m in summary.missing] == ["a dog, Van Gogh style"] * 2
    assert {f.prompt_id for f in summary.failures} == {"a fox"}, "no prompt of the list"
    assert "is none of" in summary.failures[0].reason
    assert [row["dimensions"] for row in evaluation.rows][0] == [
        "subject_consistency",
        "temporal_flickering",
    ]


def test_swapping_two_models_mirrors_their_differences(models: Path, tmp_path: Path) -> None:
    a, b = clips(tmp_path / "a", 0), clips(tmp_path / "b", 5)
    forward = evaluate("vbench", b, against=a, settings=settings(models)).comparison
    back = evaluate("vbench", a, against=b, settings=settings(models)).comparison
    assert forward is not None and back is not None
    assert forward.metrics.keys() == {*ALWAYS, MOTION}
    for key, one in forward.metrics.items():
        assert one.difference == pytest.approx(-back.metrics[key].difference)
        assert one.p == pytest.approx(back.metrics[key].p)


def test_what_is_no_number_or_not_whole_is_seen(models: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dino"
    folder.mkdir()
    (folder / "config.json").write_bytes((models / "dino" / "config.json").read_bytes())
    weights = load_file(models / "dino" / "model.safetensors")
    weights["layernorm.bias"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    row = bench(models, f"dino={folder}").score(film(), "")
    assert row["subject_consistency"] is None and "subject_consistency" in row["invalid"]
    rows = [row | {"prompt_id": "a", "k": 0, "scenario": None, "caption": "a"}]
    metric = bench(models).aggregate(rows)["subject_consistency"]
    assert (metric["percent"], metric["n"], metric["invalid"]) == (None, 0, 1)
    del weights["layernorm.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="is no whole vit model; .*layernorm.bias"):
        bench(models, f"dino={folder}").load()
    config = json.loads((models / "dino" / "config.json").read_text())
    config["num_hidden_layers"] = 10_000_000
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="could not be loaded: .* no model has more than 1,000"):
        bench(models, f"dino={folder}").load()
    with pytest.raises(UserError, match="could not be loaded: .* no model has more than 1,000"):
        bench(models, f"clip_l={folder}").load()
    torch.save({"weight": torch.zeros(1, 768), "bias": torch.zeros(1)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=r"Expected weight \(1, 12\) and bias"):
        bench(models, f"aesthetic={tmp_path / 'other.pth'}").load()
    (tmp_path / "list.json").write_text('[{"prompt": "a cat"}]')
    with pytest.raises(UserError, match="is no VBench_full_info.json"):
        bench(models, f"prompt_list={tmp_path / 'list.json'}").prompts(1, 0)
    write_video(tmp_path / "one.mp4", film(frames=1), 8)
    with pytest.raises(ClipError, match="one frame"):
        bench(models).read(tmp_path / "one.mp4")


def test_in_bfloat16_values_are_nearly_the_same(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    listed = f"prompt_list={prompt_list(tmp_path / 'list.json')}"
    asked = (((), ""), ((listed,), "a dog, Van Gogh style"))
    exact = [bench(models, *more).score(film(), prompt) for more, prompt in asked]
    monkeypatch.setattr("videorepa.benchmarks.vbench.compute_dtype", lambda *_: torch.bfloat16)
    for (more, prompt), of in zip(asked, exact, strict=True):
        assert bench(models, *more)._dtype == torch.bfloat16
        row = bench(models, *more).score(film(), prompt)
        assert not row.pop("invalid") | of.pop("invalid")
        assert row == pytest.approx(of, abs=0.05)
