"""What clips look like, against closed forms, and the warning when a training changes it."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest

from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.train import train
from videorepa.training.drift import Appearance, Drift, appearance


def grey(luma: np.ndarray) -> np.ndarray:
    """A clip (F, H, W, 3) of the luma (F, H, W) from 0 to 1."""
    return np.repeat((255 * luma).round().astype(np.uint8)[..., None], 3, -1)


def noise(frames: int = 3, amplitude: float = 0.2) -> np.ndarray:
    rng = np.random.default_rng(0)
    return 0.5 + amplitude * (rng.random((frames, 24, 32)) * 2 - 1)


def wave(period: float, amplitude: float = 0.4, shift: float = 0.0) -> np.ndarray:
    """A sine across, of four whole periods, of one frame."""
    across = np.arange(round(4 * period)) + shift
    line = 0.5 + amplitude * np.sin(2 * np.pi * across / period)
    return np.tile(line, (1, 8, 1))


def test_saturation_is_that_of_hsv() -> None:
    assert appearance(grey(noise())).saturation == 0
    colours = {(255, 0, 0): 1, (200, 100, 100): 0.5, (0, 0, 0): 0, (255, 255, 255): 0}
    for colour, expected in colours.items():
        clip = np.full((2, 4, 4, 3), colour, np.uint8)
        assert appearance(clip).saturation == pytest.approx(expected, abs=1e-6)
    half = np.zeros((1, 4, 4, 3), np.uint8)
    half[:, :2, :, 2] = 9
    assert appearance(half).saturation == pytest.approx(0.5)


def test_contrast_is_the_deviation_of_luma() -> None:
    assert appearance(grey(np.full((2, 4, 4), 0.3))).contrast == pytest.approx(0, abs=1e-6)
    board = np.indices((1, 8, 8)).sum(0) % 2
    assert appearance(grey(board)).contrast == pytest.approx(0.5)
    whole, half = appearance(grey(noise(amplitude=0.4))), appearance(grey(noise(amplitude=0.2)))
    assert whole.contrast == pytest.approx(2 * half.contrast, rel=0.01)
    green = np.zeros((1, 8, 8, 3), np.uint8)
    green[..., 1] = 255 * board
    assert appearance(green).contrast == pytest.approx(0.5 * 0.7152)


@pytest.mark.parametrize("period", [4, 8, 16])
def test_sharpness_of_a_wave_is_known_and_not_a_matter_of_contrast(period: int) -> None:
    expected = 2 * np.sin(np.pi / period)
    for amplitude in (0.4, 0.1):
        # The last column has no next pixel, so that the mean is over slightly less than periods.
        found = appearance(grey(wave(period, amplitude))).sharpness
        assert found == pytest.approx(expected, rel=0.04)
    turned = appearance(grey(wave(period).transpose(0, 2, 1)))
    assert turned.sharpness == pytest.approx(appearance(grey(wave(period))).sharpness)


def test_motion_is_the_mean_change_of_luma() -> None:
    still = np.repeat(noise(1), 4, 0)
    assert appearance(grey(still)).motion == 0
    assert appearance(grey(noise(1))).motion == 0
    steps = np.arange(4)[:, None, None] * np.full((1, 6, 6), 0.2)
    assert appearance(grey(steps)).motion == pytest.approx(0.2)
    # A ramp of 1/255 a pixel that goes 3 pixels a frame to the left.
    ramp = (np.arange(40)[None, None] + 3 * np.arange(5)[:, None, None]) / 255
    assert appearance(grey(np.tile(ramp, (1, 8, 1)))).motion == pytest.approx(3 / 255, rel=1e-4)


def test_flips_and_the_order_of_time_change_nothing() -> None:
    clip = np.random.default_rng(1).integers(0, 256, (5, 12, 16, 3), np.uint8)
    assert appearance(clip[::-1]) == pytest.approx(appearance(clip))
    # The gradient is taken down and across, so that the border it leaves out is another one.
    assert appearance(clip[:, ::-1, ::-1]) == pytest.approx(appearance(clip), rel=0.05)


@pytest.mark.parametrize(
    "clip",
    [
        np.zeros((3, 8, 8, 3), np.float32),
        np.zeros((8, 8, 3), np.uint8),
        np.zeros((3, 8, 8, 4), np.uint8),
        np.zeros((0, 8, 8, 3), np.uint8),
    ],
    ids=["floats", "image", "alpha", "empty"],
)
def test_other_arrays_are_refused(clip: np.ndarray) -> None:
    with pytest.raises(ValueError, match="expected uint8"):
        appearance(clip)


def test_ratios_their_spread_and_one_warning_each(capsys) -> None:
    base = [Appearance(0.2, 0.1, 1.0, 0.0), Appearance(0.4, 0.1, 1.0, 0.0)]
    drift = Drift(base, 0.3)
    same = drift(1, base)
    assert same == {
        **{f"drift_{q}{s}": 1 for q in Appearance._fields[:3] for s in ("", "_low", "_high")},
        "drift_outside": 0,
    }
    assert capsys.readouterr().err == ""
    pushed = [Appearance(0.2, 0.06, 1.29, 0.1), Appearance(0.7, 0.06, 1.29, 0.1)]
    found = drift(2, pushed)
    assert found["drift_saturation"] == pytest.approx(0.9 / 0.6)
    assert found["drift_saturation_low"] == pytest.approx(1)
    assert found["drift_saturation_high"] == pytest.approx(2)
    assert found["drift_contrast"] == pytest.approx(0.6)
    assert "drift_motion" not in found, "the base's clips do not move: there is no ratio"
    assert found["drift_outside"] == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "saturation of the validation clips is 0.45, 1.50 times the base model's 0.3" in said
    assert "1.00 to 2.00; the band is 0.70 to 1.30" in said
    assert "train.ema" not in said, "not the average is sampled"
    assert re.findall(r"step 2: the (\w+)", said) == ["saturation", "contrast"]
    assert drift(3, pushed) == found and capsys.readouterr().err == ""


def test_a_training_that_is_pushed_away_warns_and_a_gentle_one_does_not(
    recipe: Recipe, tmp_path, capsys
) -> None:
    prepare(recipe)
    recipe = recipe.override("validation={every: 3, prompts: [A ball falls.]}", "optim.steps=3")
    rows = {}
    for rate in ("1e-6", "0.5"):
        capsys.readouterr()
        run = train(recipe.override(f"optim.learning_rate={rate}"), tmp_path / rate)
        rows[rate] = [json.loads(line) for line in run.log_path.read_text().splitlines()]
        warned = "the band is 0.70 to 1.30" in " ".join(capsys.readouterr().err.split())
        assert warned == (rate == "0.5") == (rows[rate][-1]["drift_outside"] > 0)
        assert not any(key.startswith("drift") for row in rows[rate][:-1] for key in row)
    assert rows["1e-6"][-1]["drift_saturation"] == pytest.approx(1, abs=0.02)
    clips = [run.samples / f"step-0000000{n}" / "00.mp4" for n in (0, 3)]
    assert clips[0].read_bytes() != clips[1].read_bytes()
    base = tmp_path / "1e-6" / "samples" / "step-00000000" / "00.mp4"
    assert base.read_bytes() == clips[0].read_bytes(), "the base's clip is from before any step"
