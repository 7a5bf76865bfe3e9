"""Physics-IQ: its metrics on clips with known answers, its masks and sizes against plain
restatements, and folders as published."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from videorepa.benchmarks._physics_iq import (
    METRICS,
    Take,
    at_rate,
    compared,
    moving,
    resized,
)
from videorepa.benchmarks.physics_iq import PhysicsIQ, score
from videorepa.cli import main
from videorepa.data.video import write_video
from videorepa.errors import ClipError, UserError
from videorepa.evaluate import evaluate

SIZE = 64


def take(places: list[tuple[int, int]], grey: int = 0) -> Take:
    """A frame for each place of a moving square of 2 x 2 in 8 x 8."""
    mask = np.zeros((len(places), 8, 8), bool)
    for frame, (y, x) in zip(mask, places, strict=True):
        frame[y : y + 2, x : x + 2] = True
    return Take(np.full((*mask.shape, 3), grey, np.uint8), mask)


# The metrics.


def test_metrics_of_equal_and_of_unrelated_videos() -> None:
    a, b = take([(0, 0), (0, 2)]), take([(4, 4), (4, 6)], grey=51)
    assert compared(a, a) == dict(zip(METRICS, (0, 1, 1, 1), strict=True))
    assert compared(a, b) == dict(zip(METRICS, (pytest.approx(0.04), 0, 0, 0), strict=True))


def test_where_and_when_are_told_apart() -> None:
    """The same way in the other direction, then a pixel beside it."""
    there, back = take([(0, 0), (0, 2), (0, 4)]), take([(0, 4), (0, 2), (0, 0)])
    metrics = compared(there, back)
    assert metrics["spatiotemporal_iou"] == pytest.approx(1 / 3)
    assert metrics["spatial_iou"] == metrics["weighted_spatial_iou"] == 1
    beside = take([(0, 1), (0, 3), (0, 5)])
    metrics = compared(there, beside)
    assert metrics["spatiotemporal_iou"] == pytest.approx(2 / 6)
    assert metrics["spatial_iou"] == pytest.approx(5 / 7)
    # It is where it was in one of three frames; then it stays there.
    stays = take([(0, 0), (0, 0), (0, 0)])
    metrics = compared(there, stays)
    assert metrics["spatial_iou"] == pytest.approx(4 / 12)
    assert metrics["weighted_spatial_iou"] == pytest.approx((1 / 3) / (1 + 1 / 3 + 1 / 3))


def test_where_nothing_moves_in_either_they_agree() -> None:
    still = take([(0, 0)] * 2)._replace(moving=np.zeros((2, 8, 8), bool))
    assert compared(still, still)["weighted_spatial_iou"] == 1
    half = still._replace(moving=still.moving.copy())
    half.moving[1, 0, 0] = True
    assert compared(still, half)["spatiotemporal_iou"] == 0.5
    assert (
        compared(still, half)["spatial_iou"] == compared(still, half)["weighted_spatial_iou"] == 0
    )


def test_the_score_is_a_share_of_what_a_second_take_reaches() -> None:
    takes = np.array([0.01, 0.5, 0.8, 0.4])
    assert score(takes, takes) == pytest.approx(100)
    assert score(np.array([0.0, 1, 1, 1]), takes) == 100, "cut at 100"
    assert score(np.array([0.9, 0, 0, 0]), takes) == 0
    clips = np.array([0.03, 0.25, 0.2, 0.3])
    assert score(clips, takes) == pytest.approx(100 * ((0.5 + 0.25 + 0.75) / 3 - 0.02))
    assert score(np.stack([takes, clips]), takes).shape == (2,)


# Masks, sizes, rates.


def plain_masks(frames: np.ndarray) -> list[np.ndarray]:
    """The published rule with scipy's filters. Opening and closing do not count what lies outside:
    there it is taken for set when shrinking and for unset when growing."""
    square, kernel = np.ones((5, 5)), np.array([1, 4, 6, 4, 1]) / 16
    mean, masks = None, []
    for frame in frames:
        red, green, blue = np.moveaxis(frame.astype(float), -1, 0)
        grey = np.floor(0.299 * red + 0.587 * green + 0.114 * blue + 0.5)
        grey = ndimage.correlate1d(grey, kernel, 0, mode="mirror")
        grey = np.floor(ndimage.correlate1d(grey, kernel, 1, mode="mirror") + 0.5)
        mean = grey if mean is None else 0.7 * mean + 0.3 * grey
        mask = np.abs(grey - np.rint(mean)) > 10
        for name, outside in (("erosion", 1), ("dilation", 0), ("dilation", 0), ("erosion", 1)):
            change = getattr(ndimage, f"binary_{name}")
            mask = change(mask, square, border_value=outside)
        masks.append(mask)
    return masks


def test_masks_follow_the_published_rule() -> None:
    rng = np.random.default_rng(0)
    scene = ndimage.gaussian_filter(rng.uniform(0, 255, (40, 50, 3)), (3, 3, 0))
    scene = (255 * (scene - scene.min()) / np.ptp(scene)).astype(np.uint8)
    frames = np.stack([np.roll(scene, 3 * n, 1) for n in range(6)])
    check_masks(frames)
    # Slowly, where rounding the mean decides of many pixels.
    check_masks(np.stack([np.roll(scene, n, 1) for n in range(12)]))


def check_masks(frames: np.ndarray) -> None:
    masks = list(moving(frames))
    expected = plain_masks(frames)
    assert masks[0].dtype == np.uint8 and not masks[0].any()
    assert 0 < np.mean(expected[1:]) < 0.95, "a test of something"
    for ours, theirs in zip(masks, expected, strict=True):
        assert np.array_equal(ours, 255 * theirs)


def test_specks_and_slow_changes_do_not_move_and_the_mean_follows() -> None:
    frames = np.full((12, 30, 30, 3), 100, np.uint8)
    frames[3, 5, 5] = 255  # One pixel in one frame.
    frames[:, 20:] += np.arange(12, dtype=np.uint8)[:, None, None, None]  # A level a frame.
    frames[6:, 4:14, 4:14] = 200  # A square that comes and stays.
    shares = [mask[:16, :16].mean() / 255 for mask in moving(frames)]
    assert shares[:6] == [0] * 6 and shares[6] > 0.3
    assert shares[6] >= shares[-1] and not list(moving(frames))[-1][20:].any()
    assert shares[-1] < 0.3, "0.7^6 of 100 levels is 12 at the square's middle, less at its edge"


@pytest.mark.parametrize("size", [(5, 7), (12, 4), (30, 40), (10, 12)])
def test_resizing_is_bilinear_without_antialias(size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (10, 12, 3), np.uint8)
    height, width = size
    expected = np.empty((height, width, 3))
    for y in range(height):
        for x in range(width):
            sy = min(max((y + 0.5) * 10 / height - 0.5, 0), 9)
            sx = min(max((x + 0.5) * 12 / width - 0.5, 0), 11)
            top, left = int(sy), int(sx)
            below, right = min(top + 1, 9), min(left + 1, 11)
            a, b = sy - top, sx - left
            expected[y, x] = (1 - a) * ((1 - b) * pixels[top, left] + b * pixels[top, right])
            expected[y, x] += a * ((1 - b) * pixels[below, left] + b * pixels[below, right])
    assert np.abs(resized(pixels, height, width) - expected).max() <= 0.5 + 1e-4
    assert np.array_equal(resized(pixels[..., 0], height, width), resized(pixels, *size)[..., 0])


@pytest.mark.parametrize("rate", [8, 12.5, 16, 24, 30, 60])
def test_another_rate_is_blended_from_the_neighbours_in_time(rate: float) -> None:
    filmed = np.arange(150, dtype=np.uint8)[:, None, None, None] * np.ones((2, 2, 3), np.uint8)
    count = round(rate * 5)
    resampled = np.stack(list(at_rate(iter(filmed), rate, count)))
    assert resampled.shape == (count, 2, 2, 3)
    exact = np.minimum(np.arange(count) * 30 / rate, 149)
    assert resampled[:, 0, 0, 0] == pytest.approx(exact, abs=0.5)
    if rate == 30:
        assert np.array_equal(resampled, filmed)
    with pytest.raises(ClipError):
        list(at_rate(iter([]), rate, count))


# Folders.


def film(kind: str, delay: float = 0.0, fps: float = 30.0) -> np.ndarray:
    """Five seconds of a square on grey that crosses ("slide") or falls ("drop") after `delay` s."""
    seconds = np.maximum(np.arange(round(5 * fps)) / fps - delay, 0)
    frames = np.full((len(seconds), SIZE, SIZE, 3), 90, np.uint8)
    for frame, t in zip(frames, seconds, strict=True):
        y, x = (30, round(4 + 9 * t)) if kind == "slide" else (min(round(4 + 6 * t * t), 48), 24)
        frame[y : y + 12, x : x + 12] = 220
    return frames


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two experiments from two views, the second view turned; a second take is a little late."""
    root = tmp_path_factory.mktemp("physics-iq")
    folder = root / "split-videos" / "testing" / "30FPS"
    folder.mkdir(parents=True)
    number = 0
    lines = ["scenario,description,category,generated_video_name"]
    for take_name, delay in (("take-1", 0.0), ("take-2", 0.25)):
        for name in ("drop", "slide"):
            for view in ("perspective-left", "perspective-right"):
                number += 1
                frames = film(name, delay)[:, :, :: 1 if view.endswith("left") else -1]
                stem = f"{number:04d}_testing-videos_30FPS_{view}_{take_name}_trimmed-{name}"
                write_video(folder / f"{stem}.mp4", frames, 30)
                lines.append(
                    f"{name},A square.,Solid {name},{number:04d}_{view}_trimmed-{name}.mp4"
                )
    (root / "descriptions.csv").write_text("\n".join(lines) + "\n")
    return root


def generated(folder: Path, delay: float = 0.0, still: bool = False) -> Path:
    """What a model would give for all four, at 8 frames a second."""
    folder.mkdir(exist_ok=True)
    number = 0
    for name in ("drop", "slide"):
        for view in ("perspective-left", "perspective-right"):
            number += 1
            frames = film(name, delay, fps=8)[:, :, :: 1 if view.endswith("left") else -1]
            if still:
                frames = frames[:1].repeat(len(frames), 0)
            write_video(folder / f"{number:04d}_{view}_trimmed-{name}.mp4", frames, 8)
    return folder


@pytest.mark.slow
def test_a_perfect_a_late_and_a_still_model(data: Path, tmp_path: Path, capsys) -> None:
    perfect = generated(tmp_path / "perfect")
    still = generated(tmp_path / "still", still=True)
    setting = f"data={data}"
    evaluation = evaluate("physics_iq", perfect, against=still, settings=[setting])
    metrics = evaluation.summary.metrics
    assert evaluation.summary.n == 4 and evaluation.summary.missing == []
    assert metrics["score"].percent == 100 and metrics["score"].n == 2
    assert metrics["spatial_iou"].mean > 0.8 > metrics["spatiotemporal_iou_takes"].mean > 0.1
    # What stands still is what the benchmark itself takes for that.
    of_still = json.loads((still / "scores" / "scores.jsonl").read_text().splitlines()[0])
    assert all(of_still[m] == pytest.approx(of_still[f"{m}_static"], abs=0.02) for m in METRICS)
    difference = evaluation.comparison.metrics["score"]
    expected = 100 - metrics["static_score"].percent
    assert difference.difference == pytest.approx(expected, abs=2) and expected > 30
    assert 0 < difference.low <= difference.difference <= difference.high <= 100
    assert difference.p == pytest.approx(0.5, abs=0.02), "two experiments can say no more"
    assert evaluation.summary.by_scenario.keys() == {"Solid drop", "Solid slide"}

    late = generated(tmp_path / "late", delay=0.25)
    assert main(["evaluate", "physics_iq", str(late), "--set", setting]) == 0
    printed = capsys.readouterr().out
    assert "score" in printed and "static_score" in printed
    summary = json.loads((late / "scores" / "summary.json").read_text())
    # As late as the second take: as good as that, but for pixels and coding.
    assert summary["metrics"]["score"]["percent"] == pytest.approx(100, abs=12)
    ious = ("spatiotemporal_iou", "weighted_spatial_iou")
    for key in ious:
        of = summary["metrics"]
        assert of[key]["mean"] == pytest.approx(of[f"{key}_takes"]["mean"], abs=0.05)


def test_a_replaced_clip_or_take_is_compared_again(tmp_path: Path, capsys) -> None:
    """One experiment from one view, at 8 frames a second; its clip has no sidecar."""
    filmed, clips = tmp_path / "data" / "split-videos" / "testing" / "8FPS", tmp_path / "clips"
    for folder in (filmed, clips):
        folder.mkdir(parents=True)
    slide, still = film("slide", fps=8), film("slide", fps=8)[:1].repeat(40, 0)
    for number in (1, 2):
        name = f"000{number}_testing-videos_8FPS_left_take-{number}_trimmed-slide.mp4"
        write_video(filmed / name, slide, 8)
    clip = clips / "0001_left_trimmed-slide.mp4"
    write_video(clip, slide, 8)

    def score() -> float:
        found = evaluate("physics_iq", clips, settings=[f"data={tmp_path / 'data'}"])
        return found.summary.metrics["score"].percent

    assert score() == 100
    write_video(clip, still, 8)
    assert score() < 50
    assert "1 clip scored again" in capsys.readouterr().err
    assert score() < 50
    assert "scored again" not in capsys.readouterr().err
    for take in filmed.glob("*.mp4"):
        write_video(take, still, 8)
    assert score() == 100


@pytest.mark.slow
def test_published_masks_and_rates_are_used_where_they_are(data: Path, tmp_path: Path) -> None:
    own = tmp_path / "own"
    for folder, rate in (("30FPS", 30), ("8FPS", 8)):
        (own / "split-videos" / "testing" / folder).mkdir(parents=True)
        (own / "video-masks" / "real" / folder).mkdir(parents=True)
        for number in (1, 2):
            stem = f"000{number}_testing-videos_{folder}_left_take-{number}_trimmed-drop"
            frames = film("drop", fps=rate)
            write_video(own / "split-videos" / "testing" / folder / f"{stem}.mp4", frames, rate)
            mask = np.zeros_like(frames)
            mask[:, : 16 * number] = 255
            stem = stem.replace("testing-videos", "video-masks")
            write_video(own / "video-masks" / "real" / folder / f"{stem}.mp4", mask, rate)
    bench = PhysicsIQ(data=own)
    row = bench.score(film("drop", fps=8), "left_drop")
    assert row["spatiotemporal_iou_takes"] == pytest.approx(0.5)
    assert row["mse_takes"] == 0 and row["mse"] < 1e-4
    # At a rate of its own masks are made: both takes move alike.
    assert bench.score(film("drop", fps=16), "left_drop")["spatiotemporal_iou_takes"] == 1
    assert [p.caption for p in bench.missing(())] == ["left_drop"]
    assert bench.scenario("left_drop") is None


@pytest.mark.slow
def test_clips_that_do_not_fit_are_named(data: Path, tmp_path: Path, capsys) -> None:
    folder = generated(tmp_path / "clips")
    (folder / "0004_perspective-right_trimmed-slide.mp4").unlink()
    long = film("drop", fps=8)
    long = np.concatenate([long, long[:9]])
    write_video(folder / "0002_perspective-right_trimmed-drop.mp4", long, 8)
    write_video(folder / "0009_perspective-right_trimmed-fly.mp4", long[:40], 8)
    command = ["evaluate", "physics_iq", str(folder), "--set", f"data={data}"]
    assert main(command) == 1
    printed = capsys.readouterr()
    assert "lasts 6.125 s; expected 5 s: cut it to 40 frames at this rate" in printed.err
    assert "has no video of perspective-right_fly, take-1" in printed.err
    assert "n=2" in printed.out and "1 clip missing" in printed.out
    write_video(folder / "mine.mp4", long, 8)
    assert main(command) == 1
    assert "mine.mp4 is not named as Physics-IQ expects" in capsys.readouterr().err
    with pytest.raises(UserError, match="holds no split-videos/testing"):
        PhysicsIQ(data=tmp_path).prompts(1, 0)
    with pytest.raises(UserError, match="nowhere does not exist; expected the folder of"):
        PhysicsIQ(data=tmp_path / "nowhere").prompts(1, 0)


@pytest.mark.parametrize(
    ("kind", "folder"), [("testing", "12FPS"), ("testing", "30FPS"), ("masks", "12FPS")]
)
def test_films_of_another_rate_than_their_name_says_are_refused(
    tmp_path: Path, kind: str, folder: str
) -> None:
    """The published tool writes films of 12.5 frames a second under 12FPS. Frame by frame, they
    would be compared with a clip at other times."""
    root = tmp_path / ("split-videos/testing" if kind == "testing" else "video-masks/real")
    for path, rate in ((tmp_path / "split-videos/testing/30FPS", 30), (root / folder, 12.5)):
        path.mkdir(parents=True, exist_ok=True)
        for number in (1, 2):
            name = f"000{number}_{kind}-videos_{path.name}_left_take-{number}_trimmed-slide.mp4"
            if rate == 30:
                name = name.replace(kind, "testing")
            write_video(path / name, film("slide", fps=rate), rate)
    with pytest.raises(ClipError, match=rf"{folder}_.* has 12.5 frames a second and not the"):
        PhysicsIQ(data=tmp_path).score(film("slide", fps=12), "left_slide")


NTSC, FILM = Fraction(30000, 1001), Fraction(24000, 1001)


@pytest.mark.parametrize(("rate", "count"), [(NTSC, 150), (FILM, 120), (30, 150), (7.3, 37)])
def test_five_seconds_are_counted_to_half_a_frame(
    tmp_path: Path, rate: float | Fraction, count: int
) -> None:
    bench = PhysicsIQ(data=tmp_path)
    for frames, refused in ((count, ""), (count + 1, "cut it to"), (count - 2, "generate")):
        path = tmp_path / f"{frames}.mp4"
        write_video(path, np.zeros((frames, 16, 16, 3), np.uint8), rate)
        if not refused:
            assert len(bench.read(path)) == frames
            continue
        whole = round(5 * rate)
        with pytest.raises(ClipError, match=f"expected 5 s: {refused} {whole} frames at this rate"):
            bench.read(path)


def test_clips_can_be_named_by_the_id_of_the_first_take(tmp_path: Path) -> None:
    films = tmp_path / "data" / "split-videos" / "testing"
    clips = tmp_path / "clips"
    clips.mkdir()
    for rate in ("30FPS", "8FPS"):
        (films / rate).mkdir(parents=True)
        for number, view, take in ((1, "left", 1), (2, "right", 1), (3, "left", 2)):
            name = f"{number:04d}_testing-videos_{rate}_{view}_take-{take}_trimmed-drop.mp4"
            (films / rate / name).touch()
    bench = PhysicsIQ(data=tmp_path / "data")
    for names in (["0001.mp4", "2_mine.mp4"], ["0001_x.mp4", "0002_right_trimmed-drop.mp4"]):
        for name in names:
            (clips / name).touch()
        found = [(path.name, about["prompt_id"]) for path, about in bench.clips(clips)]
        assert found == list(zip(names, ["left_drop", "right_drop"], strict=True))
        for name in names:
            (clips / name).unlink()
    for name in ("0001.mp4", "0001_x.mp4", "0003.mp4", "x.mp4"):
        (clips / name).touch()
    with pytest.raises(UserError, match="0001.mp4 and 0001_x.mp4 are both clips of left_drop"):
        bench.clips(clips)
    (clips / "0001_x.mp4").unlink()
    with pytest.raises(UserError, match="0003.mp4 is not named .*its id stands for no video in"):
        bench.clips(clips)
    (clips / "0003.mp4").unlink()
    with pytest.raises(UserError, match="x.mp4 is not named as Physics-IQ expects, for .* 0001"):
        bench.clips(clips)
    # Two experiments with one id, as if two versions of the data lay there.
    (films / "30FPS" / "0001_testing-videos_30FPS_left_take-1_trimmed-slide.mp4").touch()
    (clips / "x.mp4").unlink()
    with pytest.raises(UserError, match="its id stands for left_drop, left_slide in"):
        PhysicsIQ(data=tmp_path / "data").clips(clips)
