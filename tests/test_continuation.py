"""The lab's clips continued from their first frames: the model and the benchmark."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from videorepa.artifacts.clips import readable_clips
from videorepa.backbones import _micro
from videorepa.backbones.cogvideox import CogVideoX
from videorepa.benchmarks.continuation import (
    ABSENT,
    ABSENT_SPEED,
    Continuations,
    TrueMotion,
    errors,
    true_clip,
)
from videorepa.errors import ClipError, UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.tables import table
from videorepa.generate import generate
from videorepa.lab.models.assemble import AssembleRecipe, assemble
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.hub import micro_weights
from videorepa.world.simulator import FRAMES

CPU = torch.device("cpu")
BENCH = Continuations()


# The model.


def arguments(transformer, channels: int) -> dict:
    draw = torch.Generator().manual_seed(0)
    return {
        "hidden_states": torch.randn(1, 2, channels, 16, 16, generator=draw),
        "encoder_hidden_states": torch.randn(1, 24, 96, generator=draw),
        "timestep": torch.tensor([400]),
        "return_dict": False,
    }


@torch.no_grad()
def test_a_wider_model_gives_at_first_what_the_base_gives_whatever_the_image(tmp_path) -> None:
    base = CogVideoX(weights="micro").load(("transformer",), CPU).transformer
    micro = micro_weights("cogvideox")
    recipe = {"parts": micro, "start": micro / "transformer", "from_image": True}
    assemble(AssembleRecipe(out=tmp_path / "wide", **recipe))
    spec = CogVideoX(weights=str(tmp_path / "wide"))
    assert spec.takes_image and spec.stock_pipeline == "CogVideoXImageToVideoPipeline"
    assert spec.fingerprint() == CogVideoX(weights="micro").fingerprint()  # They share a cache.
    wide = spec.load(("transformer",), CPU).transformer
    asked = arguments(base, 16)
    text_mode = asked | {"hidden_states": asked["hidden_states"][:, :, :8]}
    torch.testing.assert_close(wide(**asked)[0], base(**text_mode)[0])


def test_the_image_model_is_put_together_once_for_all_that_ask(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    _micro.image_model.cache_clear()
    folder = _micro.image_model()
    assert folder.parent == tmp_path / "videorepa"
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    _micro.image_model.cache_clear()
    monkeypatch.setattr(_micro, "_put_together", lambda *_: pytest.fail("made again"))
    assert _micro.image_model() == folder
    shutil.rmtree(folder)
    _micro.image_model.cache_clear()

    def slower(base: Path, lora: Path, out: Path) -> None:
        folder.mkdir()  # Meanwhile another process has it.
        (folder / "whole").touch()
        out.mkdir()

    monkeypatch.setattr(_micro, "_put_together", slower)
    assert _micro.image_model() == folder and (folder / "whole").exists()
    _micro.image_model.cache_clear()


@torch.no_grad()
def test_the_image_model_is_the_base_with_its_lora() -> None:
    spec = CogVideoX(weights="micro-i2v")
    assert spec.conditioning() is not None and spec.takes_image
    assert spec.default_size() == ClipSize(frames=17, height=64, width=64)
    ours = spec.load(("transformer",), CPU).transformer
    base = CogVideoX(weights="micro").load(("transformer",), CPU).transformer
    wide, lora = _micro.widened(base), micro_weights("cogvideox-i2v.safetensors")
    assert lora.stat().st_size < 5e6
    asked = arguments(wide, 16)
    plain = wide(**asked)[0]
    wide.load_lora_adapter(lora.parent, weight_name=lora.name)
    theirs, found = wide(**asked)[0], ours(**asked)[0]
    assert (found - theirs).norm() < 1e-3 * (found - plain).norm()


# The benchmark.


def test_prompts_are_clips_of_a_series_of_their_own_with_their_first_frames() -> None:
    few, more = BENCH.prompts(3, 0), BENCH.prompts(13, 0)
    assert more[:3] == few and len({prompt.id for prompt in more}) == 13
    assert BENCH.prompts(3, 1)[0].id != few[0].id
    for prompt in (few[0], more[12]):
        clip = true_clip(prompt.caption)
        assert prompt.text == clip.caption and prompt.image is not None
        assert np.array_equal(np.array(Image.open(prompt.image)), clip.frames[0])
        assert np.array_equal(BENCH.filmed(prompt.caption, FRAMES, 64, 64), clip.frames)
    assert BENCH.scenario(more[12].caption) == more[12].id.partition("-")[0]
    assert BENCH.filmed(few[0].caption, 9, 64, 64) is None
    for name in ("fall-0", "juggle-0-0000", "A red ball falls."):
        with pytest.raises(UserError, match="names no clip"):
            BENCH.score(true_clip(few[0].caption).frames, name)


def test_the_true_clip_is_hardly_off_and_a_copy_of_its_first_frame_is() -> None:
    for prompt in BENCH.prompts(11, 0):
        frames = true_clip(prompt.caption).frames
        true = BENCH.score(frames, prompt.caption)
        assert true["position_error"] < 0.5 and true["lost"] == 0, prompt.id
        assert true["compared"] >= 7 and {"sa", "pc", "motion"} <= true.keys()
        copied = BENCH.score(frames[:1].repeat(FRAMES, 0), prompt.caption)
        for error in ("position_error", "velocity_error"):
            assert copied[error] == pytest.approx(copied[f"static_{error}"], abs=0.6), prompt.id
            assert copied[f"static_{error}"] == true[f"static_{error}"] > 2 * true[error]
        assert len(true["position_errors"]) == FRAMES and true["velocity_errors"][0] is None
    with pytest.raises(ClipError, match="9 frames"):
        BENCH.score(frames[:9], prompt.caption)


def test_a_body_that_vanishes_is_as_far_off_as_can_be_and_is_counted() -> None:
    prompt = next(p for p in BENCH.prompts(11, 0) if p.id.startswith("roll"))
    clip = true_clip(prompt.caption)
    gone = clip.frames.copy()
    gone[9:] = gone[9:].mean(-1, keepdims=True).astype(np.uint8)  # All colours fade.
    scored = BENCH.score(gone, prompt.caption)
    assert scored["position_errors"][9:] == [ABSENT] * 8
    assert scored["velocity_errors"][9:] == [ABSENT_SPEED] * 8
    assert scored["lost"] == 50 and scored["position_error"] > ABSENT / 2


def test_errors_are_of_frames_in_view_and_to_vanish_never_pays() -> None:
    place = np.zeros((4, 2, 2))
    place[:, 0, 0] = [0, 1, 2, 3]
    shown = np.ones((4, 2), bool)
    shown[2, 1] = False
    truth = TrueMotion(place, shown)
    there = place + [3.0, 4.0]
    position, velocity = errors(there, truth)
    assert position[:, 0].tolist() == [5] * 4 and velocity[1:, 0].tolist() == [0] * 3
    assert np.isnan(position[2, 1]) and np.isnan(velocity[:, 1]).tolist() == [1, 0, 1, 1]
    far = place + 100.0 * np.arange(4)[:, None, None]
    lost = np.full_like(place, np.nan)
    for least, most in zip(errors(far, truth), errors(lost, truth), strict=True):
        known = np.isfinite(most)
        assert (least[known] <= most[known]).all()


def test_clips_of_another_rate_are_refused() -> None:
    assert BENCH.form(8.0).whole_image
    with pytest.raises(UserError, match="generation.fps to 8"):
        BENCH.form(16.0)


def test_the_image_model_makes_clips_that_are_scored_beside_the_true_ones(tmp_path) -> None:
    prompts, out = BENCH.prompts(2, 0), tmp_path / "clips"
    settings = Generation(steps=2, guidance_scale=1.0)
    with pytest.raises(UserError, match="takes text alone"):
        generate(Path("micro"), prompts, out, settings=settings, benchmark=BENCH)
    generate(Path("micro-i2v"), prompts, out, settings=settings, benchmark=BENCH)
    clips = readable_clips(out)
    for prompt in prompts:
        clip = clips[prompt.id, 0]
        assert clip.caption == prompt.caption
        assert clip.kept_image and clip.kept_film
    scores = evaluate("continuation", out, against=out)
    assert scores.summary.metrics["position_error"].n == 2
    assert scores.comparison is not None
    assert scores.comparison.metrics["velocity_error"].difference == 0
    printed = table({"image model": scores})
    assert " position_error " in printed and " static_velocity_error " in printed
    assert "velocity_error +0.0000" in printed and " sa " in printed
