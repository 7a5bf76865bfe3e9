"""Surprise: V-JEPA 2's predictor against golden answers, what it may see, and clips that do not
fit. The golden numbers are answers of the published code for random weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from videorepa.benchmarks.surprise import CONTEXTS, Surprise, TokenPredictor
from videorepa.data.video import write_video
from videorepa.errors import ClipError, UserError
from videorepa.evaluate import evaluate
from videorepa.evaluation.tables import table

FOLDER = Path(__file__).parent / "golden" / "vjepa2_predictor_tiny"


@pytest.fixture(scope="module")
def golden() -> dict[str, Tensor]:
    return load_file(FOLDER.parent / "vjepa2_predictor_io.safetensors")


@pytest.fixture(scope="module")
def live() -> TokenPredictor:
    return TokenPredictor.load(FOLDER, torch.device("cpu"), torch.float32)


def error(value: Tensor, expected: Tensor) -> float:
    return float((value - expected).norm() / expected.norm())


def test_what_is_predicted_and_its_surprise_are_the_published_codes(
    golden: dict[str, Tensor], live: TokenPredictor
) -> None:
    window = golden["video"].transpose(1, 2)
    predicted = live.predicted(window, 8)
    assert error(predicted, golden["half.predicted_0"][0]) < 1e-5
    assert error(live.surprises(window, [8])[0], golden["half.surprise_0"][0]) < 1e-5
    # Mistakes show: the mask token that the stock class takes, and a future that has been seen.
    assert error(predicted, golden["half.predicted_1"][0]) > 0.5
    assert error(predicted, golden["half.leaked_predicted_0"][0]) > 0.2
    # And so do the encoder's own features as the target, and the predicted ones under the norm.
    target, expected = golden["half.target_features"][0], golden["half.surprise_0"][0]
    assert error((predicted - target).abs().mean(-1), expected) > 0.01
    normed = F.layer_norm(target, target.shape[-1:])
    assert error((predicted - normed).abs().mean(-1), expected) < 1e-5
    normed_prediction = F.layer_norm(predicted, predicted.shape[-1:])
    assert error((normed_prediction - normed).abs().mean(-1), expected) > 0.01


def test_nothing_is_predicted_from_what_comes_later(
    golden: dict[str, Tensor], live: TokenPredictor
) -> None:
    window = golden["video"].transpose(1, 2)
    for context in CONTEXTS:
        other = window.clone()
        other[:, context:] = torch.randn(other[:, context:].shape, generator=torch.manual_seed(0))
        assert torch.equal(live.predicted(window, context), live.predicted(other, context))
        assert len(live.predicted(window, context)) == (16 - context) // 2 * 16
        other[:, context - 1] += 1
        assert not torch.equal(live.predicted(window, context), live.predicted(other, context))


# Clips.


def clip(frames: int = 20, speed: float = 2.0, seed: int = 0) -> np.ndarray:
    """Noise that slides."""
    picture = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), np.uint8)
    return np.stack([np.roll(picture, round(speed * n), 1) for n in range(frames)])


BENCH = Surprise(judge=str(FOLDER), precision="float32", every=1, stride=3)


def test_a_clips_score_is_made_of_its_windows(live: TokenPredictor) -> None:
    frames = clip()
    row = BENCH.score(frames, "whatever")
    assert row["windows"] == 2 and row["by_context"].keys() == set(map(str, CONTEXTS))
    windows = [live.prepared(frames[start : start + 16]) for start in (0, 3)]
    expected = [[float(of.mean()) for of in live.surprises(window)] for window in windows]
    assert pytest.approx(np.array(expected)) == np.array(list(row["by_context"].values())).T
    least = np.min(expected, 1)
    assert row["surprise"] == pytest.approx(least.mean())
    assert row["surprise_max"] == pytest.approx(least.max())
    step = np.abs(frames[1].astype(int) - frames[0]).mean()
    assert row["motion"] == pytest.approx(step) and BENCH.score(clip(speed=0), "")["motion"] == 0
    # Every second frame takes 31 frames a window.
    thinned = Surprise(judge=str(FOLDER), precision="float32")
    assert thinned.score(clip(35), "")["windows"] == 3
    first = live.prepared(clip(35)[:31:2])
    of_first = [float(of.mean()) for of in live.surprises(first)]
    by_context = thinned.score(clip(35), "")["by_context"]
    assert [values[0] for values in by_context.values()] == pytest.approx(of_first)


def test_each_window_has_the_number_of_seen_frames_that_suits_it() -> None:
    """Of two windows the first surprises least by few seen frames, the second by many."""
    by_window = iter(([0.2, 0.5, 0.5, 0.5, 0.6], [0.9, 0.5, 0.5, 0.5, 0.4]))

    class Judge:
        def prepared(self, frames: np.ndarray) -> np.ndarray:
            return frames

        def surprises(self, window: np.ndarray) -> list[Tensor]:
            return [torch.tensor([value]) for value in next(by_window)]

    bench = BENCH.model_copy()
    vars(bench)["live"] = Judge()
    row = bench.score(clip(), "whatever")
    assert row["surprise"] == pytest.approx(0.3) and row["surprise_max"] == pytest.approx(0.4)


def test_frames_are_squashed_and_normalised(live: TokenPredictor) -> None:
    frames = np.zeros((16, 48, 96, 3), np.uint8)
    frames[..., 0] = 255
    video = live.prepared(frames)
    assert video.shape == (1, 16, 3, 64, 64)
    expected = [(1 - 0.485) / 0.229, -0.456 / 0.224, -0.406 / 0.225]
    assert video[0, 0, :, 0, 0].tolist() == pytest.approx(expected, rel=1e-5)


def folder_of(folder: Path, speeds: list[float], frames: int = 20) -> Path:
    folder.mkdir()
    lines = []
    for number, speed in enumerate(speeds):
        write_video(folder / f"{number}.mp4", clip(frames, speed, number), 8)
        lines.append({"video": f"{number}.mp4", "caption": f"clip {number}", "id": f"c{number}"})
    listed = folder / "clips.jsonl"
    listed.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return listed


SETTINGS = [f"judge={FOLDER}", "precision=float32", "every=1", "stride=4"]


def test_clips_are_compared_in_pairs_and_swapping_them_mirrors_it(tmp_path: Path) -> None:
    a = folder_of(tmp_path / "a", [0, 0, 0])
    b = folder_of(tmp_path / "b", [2, 3, 4])
    forward = evaluate("surprise", b, against=a, settings=SETTINGS)
    back = evaluate("surprise", a, against=b, settings=SETTINGS)
    assert forward.comparison is not None and back.comparison is not None
    for key in ("surprise", "surprise_max", "motion"):
        one, other = forward.comparison.metrics[key], back.comparison.metrics[key]
        assert one.difference == pytest.approx(-other.difference) and one.p == other.p
        of = [[row[key] for row in each.rows] for each in (forward, back)]
        assert one.difference == pytest.approx(np.mean(of[0]) - np.mean(of[1]))
    assert forward.comparison.metrics["motion"].difference > 10
    # It says of itself, in rows and table, that it is no stranger to a V-JEPA 2 teacher.
    assert all("not independent" in row["about"] for row in forward.rows)
    printed = table({"b": forward})
    assert "not independent" in printed
    assert f"motion {forward.comparison.metrics['motion'].difference:+.4f} [" in printed


def test_clips_of_another_length_are_not_compared(tmp_path: Path) -> None:
    a, b = folder_of(tmp_path / "a", [1]), folder_of(tmp_path / "b", [1], frames=28)
    with pytest.raises(UserError, match="'c0' 0 has 4 windows in one of the two sets and 2"):
        evaluate("surprise", b, against=a, settings=SETTINGS)
    with pytest.raises(ClipError, match="has 15 frames; a window of 16 takes 16"):
        BENCH.score(clip(15), "")
    with pytest.raises(ClipError, match="20 frames; a window of 16 takes 31.*--set every=1"):
        Surprise(judge=str(FOLDER)).score(clip(20), "")


def damaged(folder: Path, change: Any) -> Path:
    folder.mkdir()
    (folder / "config.json").write_bytes((FOLDER / "config.json").read_bytes())
    weights = load_file(FOLDER / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_a_judge_that_is_broken_or_without_predictor_is_seen(tmp_path: Path) -> None:
    def broken(weights: dict[str, Tensor]) -> None:
        weights["predictor.proj.bias"][0] = torch.nan

    bench = Surprise(judge=str(damaged(tmp_path / "nan", broken)), precision="float32", every=1)
    row = bench.score(clip(16), "")
    assert row["surprise"] is None and "not finite" in row["invalid"]["surprise"]
    rows = [row | {"prompt_id": "a", "k": 0, "scenario": None, "caption": "a"}]
    metric = bench.aggregate(rows)["surprise"]
    assert (metric["mean"], metric["n"], metric["invalid"]) == (None, 0, 1)
    assert bench.compare(rows, rows).keys() == {"motion", "unpaired"}

    def without(weights: dict[str, Tensor]) -> None:
        for name in [name for name in weights if name.startswith("predictor.")]:
            del weights[name]

    bench = Surprise(judge=str(damaged(tmp_path / "none", without)), precision="float32", every=1)
    with pytest.raises(UserError, match=r"is no V-JEPA 2; .*predictor.*with the predictor"):
        bench.load()

    path = tmp_path / "none" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 10_000_000}))
    bench = Surprise(judge=str(path.parent), precision="float32", every=1)
    with pytest.raises(UserError, match="could not be loaded: .* no model has more than 1,000"):
        bench.load()


def test_a_lack_of_memory_is_not_taken_for_a_damaged_judge(monkeypatch) -> None:
    from transformers import VJEPA2Model

    def full(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr(VJEPA2Model, "from_pretrained", full)
    with pytest.raises(MemoryError):
        TokenPredictor.load(FOLDER, torch.device("cpu"), torch.float32)


def test_in_bfloat16_surprise_is_nearly_the_same(golden: dict[str, Tensor]) -> None:
    live = TokenPredictor.load(FOLDER, torch.device("cpu"), torch.bfloat16)
    window = golden["video"].transpose(1, 2).bfloat16()
    assert error(live.surprises(window, [8])[0], golden["half.surprise_0"][0]) < 0.02
