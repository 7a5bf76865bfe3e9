"""Physics-IQ Verified: its score by hand and on the board's numbers, its runs, and folders as
published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from conftest import recipe_values
from twins import TWINS
from videorepa.artifacts.scores import Row
from videorepa.benchmarks._physics_iq import METRICS, VERIFIED, keys
from videorepa.benchmarks.physics_iq import PhysicsIQ
from videorepa.benchmarks.physics_iq_verified import PhysicsIQVerified, sample_scores
from videorepa.cli import main
from videorepa.data.video import read_shape, resize, write_video
from videorepa.errors import UserError
from videorepa.evaluate import evaluate

TAKES = {"mse_takes": 0.01, "spatiotemporal_iou_takes": 0.5} | {
    f"{key}_takes": 0.8 for key in ("spatial_iou", "weighted_spatial_iou")
}


def scored(mse: float, spatiotemporal: float, spatial: float, weighted: float) -> dict[str, float]:
    return sample_scores(
        dict(zip(METRICS, (mse, spatiotemporal, spatial, weighted), strict=True)) | TAKES
    )


def test_a_sample_scores_the_mean_of_four_clipped_ratios() -> None:
    of = scored(0.02, 0.25, 0.2, 0.8)
    expected = {"mse": 50, "spatiotemporal_iou": 50, "spatial_iou": 25, "weighted_spatial_iou": 100}
    assert {key: of[f"score_{key}"] for key in METRICS} == pytest.approx(expected, rel=1e-5)
    assert of["score"] == pytest.approx((50 + 50 + 25 + 100) / 4)
    assert scored(0.0, 1, 1, 1)["score"] == 100, "no part exceeds 100, and no error is no division"
    # What beats the takes in one part cannot make up for another, as it can in the first version.
    assert scored(0.01, 1.0, 0.4, 0.8)["score"] == pytest.approx(87.5)


def rows_of(runs: list[dict[str, float]]) -> list[Row]:
    parts = {f"score_{key}": 50.0 for key in METRICS} | {"score_static": 12.0}
    return [
        {"prompt_id": name, "k": k, "scenario": None, "caption": name, "score": value} | parts
        for k, run in enumerate(runs)
        for name, value in run.items()
    ]


BENCH = PhysicsIQVerified(data=Path("nowhere"))

BOARD = [33.08, 30.34, 32.97, 30.61]
"""The published board's four runs of CogVideoX-5B-I2V, whose entry is 31.75 +- 1.47."""


def test_mean_and_deviation_over_runs_are_those_of_the_board() -> None:
    names = [f"{view}_{name}" for view in ("left", "right") for name in ("drop", "fly", "slide")]
    score = BENCH.aggregate(rows_of([dict.fromkeys(names, run) for run in BOARD]))["score"]
    assert score["percent"] == pytest.approx(31.75, abs=0.005)
    assert score["deviation"] == pytest.approx(1.47, abs=0.01)
    assert [run["score"] for run in score["runs"]] == pytest.approx(BOARD)
    assert (score["n"], score["prompts"]) == (24, 3), "views of an experiment are alike"
    single = BENCH.aggregate(rows_of([dict.fromkeys(names, 30.0)]))["score"]
    assert single["deviation"] is None


def test_experiments_are_told_by_captions_whatever_the_clips_are_called() -> None:
    """A list names its clips as it likes."""
    rows = rows_of([{"left_drop": 10.0, "right_drop": 20.0, "left_fly": 60.0}] * 2)
    metrics = {key: number / 7 for number, key in enumerate(keys(), 1)}
    first = [row | metrics | {"k": 0} for row in rows[:3]]
    of_takes = PhysicsIQ(data=Path("nowhere"))
    for name in ("clip{}", "0001_{}.mp4"):
        renamed = [row | {"prompt_id": name.format(n % 3)} for n, row in enumerate(rows)]
        assert BENCH.aggregate(renamed) == BENCH.aggregate(rows)
        renamed = [row | {"prompt_id": name.format(n)} for n, row in enumerate(first)]
        found = of_takes.aggregate(renamed)["score"]
        assert found["n"] == 2 and found == of_takes.aggregate(first)["score"]


def test_runs_of_other_samples_have_no_deviation_and_samples_count_alike() -> None:
    runs = [{"left_drop": 10.0, "right_drop": 20.0, "left_fly": 60.0}, {"left_drop": 30.0}]
    score = BENCH.aggregate(rows_of(runs))["score"]
    assert score["percent"] == pytest.approx((20 + 20 + 60) / 3), "a sample is its runs' mean"
    assert score["deviation"] is None
    assert [(run["score"], run["n"]) for run in score["runs"]] == [(30, 3), (30, 1)]


def test_a_comparison_is_paired_by_sample_and_run_and_mirrored_by_swapping() -> None:
    rng = np.random.default_rng(0)
    names = [f"{view}_e{n}" for view in ("left", "right") for n in range(12)]
    a = rows_of([{name: float(rng.uniform(20, 60)) for name in names} for _ in range(2)])
    b = [row | {"score": row["score"] + 4 + float(rng.normal())} for row in a]
    result = BENCH.compare(a, b[1:])
    assert result["unpaired"] == 1
    gain = result["score"]
    expected = [y["score"] - x["score"] for x, y in zip(a[1:], b[1:], strict=True)]
    assert gain["difference"] == pytest.approx(np.mean(expected), abs=0.1)
    assert 3 < gain["low"] < gain["difference"] < gain["high"] < 5 and gain["p"] < 0.01
    assert (gain["n"], gain["prompts"]) == (47, 12)
    mirrored = BENCH.compare(b, a)["score"]
    assert mirrored["difference"] == pytest.approx(-BENCH.compare(a, b)["score"]["difference"])
    with pytest.raises(UserError, match="expected one row for each prompt id and k"):
        BENCH.compare(a, [*b, b[0]])


# Folders.


def film(speed: float) -> np.ndarray:
    """Five seconds at 8 frames a second of a square that crosses."""
    frames = np.full((40, 64, 64, 3), 90, np.uint8)
    for number, frame in enumerate(frames):
        x = min(round(4 + speed * number), 50)
        frame[24:36, x : x + 12] = 220
    return frames


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """The refined files of one experiment from one view; its masks are not what would be made."""
    root = tmp_path / VERIFIED
    films, masks = root / "split-videos/testing/8FPS", root / "video-masks/real/8FPS"
    films.mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in (1, 2):
        stem = f"000{number}_testing-videos_8FPS_left_take-{number}_trimmed-slide"
        write_video(films / f"{stem}.mp4", film(1.0), 8)
        mask = np.zeros((40, 64, 64, 3), np.uint8)
        mask[:, : 16 * number] = 255
        write_video(masks / f"{stem.replace('testing-videos', 'video-masks')}.mp4", mask, 8)
    (tmp_path / "descriptions_base.csv").write_text(
        "scenario,description,category,generated_video_name\n"
        "slide,A square.,Solid Mechanics,0001_left_trimmed-slide.mp4\n"
    )
    return tmp_path


def run(folder: Path, speed: float, rate: int = 8) -> Path:
    folder.mkdir(parents=True)
    write_video(folder / "0001_left_trimmed-slide.mp4", film(speed), rate)
    return folder


def test_four_runs_are_scored_with_the_files_own_masks(data: Path, capsys: Any) -> None:
    for number in range(1, 5):
        run(data / "clips" / f"mine-bpp-run_0{number}", 1.0 - number / 8)
    settings = [f"data={data}", f"descriptions={data / 'descriptions_base.csv'}"]
    evaluation = evaluate("physics_iq_verified", data / "clips", settings=settings)
    assert [row["k"] for row in evaluation.rows] == [0, 1, 2, 3]
    assert all(row["spatiotemporal_iou_takes"] == pytest.approx(0.5) for row in evaluation.rows)
    assert all(row["score"] == sample_scores(row)["score"] for row in evaluation.rows)
    assert evaluation.summary.by_scenario.keys() == {"Solid Mechanics"}
    summary = json.loads((data / "clips" / "scores" / "summary.json").read_text())
    values = [row["score"] for row in evaluation.rows]
    score = summary["metrics"]["score"]
    assert score["percent"] == pytest.approx(np.mean(values))
    assert score["deviation"] == pytest.approx(np.std(values, ddof=1)) and len(set(values)) > 1
    # One run alone is a folder as the first version wants it; the files' own folder will do.
    alone = data / "clips" / "mine-bpp-run_01"
    command = ["evaluate", "physics_iq_verified", str(alone), "--set", f"data={data / VERIFIED}"]
    assert main(command) == 0
    assert f"score {values[0]:5.1f}" in capsys.readouterr().out


def test_runs_that_do_not_fit_are_refused(data: Path) -> None:
    clips = data / "clips"
    bench = PhysicsIQVerified(data=data)
    run(clips / "mine-bpp-run_01", 1.0)
    run(clips / "mine-bpp-run_02", 1.0)
    with pytest.raises(UserError, match="are the same file. Expected runs with different seeds"):
        bench.clips(clips)
    (clips / "mine-bpp-run_02").rename(clips / "mine-op-run_02")
    with pytest.raises(UserError, match="several models or prompts .*mine-bpp-run_01, mine-op"):
        bench.clips(clips)
    (clips / "mine-op-run_02").rename(clips / "mine-bpp-run_1")
    with pytest.raises(UserError, match="expected each number once"):
        bench.clips(clips)
    (clips / "0001.mp4").touch()
    with pytest.raises(UserError, match="0001.mp4 lies beside the runs"):
        bench.clips(clips)


def test_other_files_and_masks_of_our_own_are_refused(data: Path, tmp_path: Path) -> None:
    first = tmp_path / "physics-IQ-benchmark"
    (data / VERIFIED).rename(first)
    with pytest.raises(UserError, match="first Physics-IQ have the same names and give other sco"):
        PhysicsIQVerified(data=first).prompts(1, 0)
    first.rename(data / VERIFIED)
    bench = PhysicsIQVerified(data=data)
    for mask in (data / VERIFIED / "video-masks").rglob("*take-1*.mp4"):
        mask.unlink()
    with pytest.raises(UserError, match="no mask of left_slide, take-1, at 8 frames a second"):
        bench.score(film(1.0), "left_slide")
    with pytest.raises(UserError, match="of the refined benchmark.*physics_iq_verified"):
        PhysicsIQ(data=data / VERIFIED).prompts(1, 0)


# From first frames to a score.

SWITCH = "switch-frames"


@pytest.fixture
def filmed(tmp_path: Path) -> Path:
    """One experiment from two views, wider than high, at one frame a second."""
    root = tmp_path / VERIFIED
    films, masks = root / "split-videos/testing/1FPS", root / "video-masks/real/1FPS"
    frames = root / SWITCH
    lines = ["scenario,description,category,generated_video_name"]
    for folder in (films, masks, frames):
        folder.mkdir(parents=True)
    for number, (take, view) in enumerate((t, v) for t in (1, 2) for v in ("left", "right")):
        kind = f"1FPS_{view}_take-{take}_trimmed-slide.mp4"
        clip = film(8.0 + take)[:5]
        clip = np.concatenate([clip, clip[:, :, :32]], axis=2)
        write_video(films / f"000{number + 1}_testing-videos_{kind}", clip, 1)
        moving = np.where(clip > 200, 255, 0).astype(np.uint8)
        write_video(masks / f"000{number + 1}_video-masks_{kind}", moving, 1)
        lines.append(f"slide,A square slides.,Solid,000{number + 1}_{view}_trimmed-slide.mp4")
        if take == 1:
            name = f"000{number + 1}_{SWITCH}_anyFPS_{view}_trimmed-slide.jpg"
            Image.fromarray(clip[0]).save(frames / name)
    (tmp_path / "descriptions_base.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


@pytest.fixture
def model(tmp_path: Path, twins: dict[str, Path]) -> Path:
    """A recipe of a model that continues an image, with clips of 9 frames at 1 a second."""
    described, make = TWINS["wan-2.2-ti2v"]
    values = recipe_values(twins, tmp_path / "unused.csv", tmp_path / "cache")
    values["backbone"] = {**described, "weights": str(make(tmp_path / "model"))}
    values["data"] |= {"frames": 9, "height": 32, "width": 32}
    values["generation"] |= {"fps": 1, "steps": 1, "dynamic_guidance": False}
    path = tmp_path / "i2v.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_first_frames_become_four_runs_with_a_score(
    filmed: Path, model: Path, tmp_path: Path, capsys: Any
) -> None:
    out, files = tmp_path / "made", f"data={filmed}"
    settings = ["--set", files, "--set", f"descriptions={filmed / 'descriptions_base.csv'}"]
    made = ["generate", str(model), "--prompts", "physics_iq_verified", "--out", str(out)]
    assert main([*made, *settings]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "cut to the first 5, as physics_iq_verified scores them; 4 frames of each" in said
    clips = {path.name: path for path in out.glob("*.mp4")}
    assert sorted(clips) == [f"{v}_slide-{k}.mp4" for v in ("left", "right") for k in range(4)]
    for k in range(4):
        named = sorted((out / f"run_0{k + 1}").iterdir())
        assert [path.name for path in named] == [
            "0001_left_trimmed-slide.mp4",
            "0002_right_trimmed-slide.mp4",
        ]
        assert named[0].samefile(out / f"left_slide-{k}.mp4")
    assert read_shape(clips["left_slide-0.mp4"]) == (1.0, 5, 32, 32)
    assert read_shape(out / "filmed" / "left_slide.mp4") == (1.0, 5, 32, 32)
    about = json.loads((out / "left_slide-3.json").read_text())
    assert (about["prompt"], about["caption"]) == ("A square slides.", "left_slide")
    assert (about["frames"], about["cut_from"], about["whole_image"]) == (5, 9, True)
    with Image.open(out / "images" / f"{about['image']}.png") as shown:
        pixels = np.asarray(shown)
    with Image.open(next((filmed / VERIFIED / SWITCH).glob("0001*"))) as whole:
        assert np.array_equal(pixels, resize(np.array(whole), 32, 32)), "squeezed, not cropped"

    # Finished clips stay; one that was lost is made again, under its published name too.
    before = {name: path.stat().st_mtime_ns for name, path in clips.items()}
    clips["left_slide-1.mp4"].unlink()
    assert main([*made, *settings]) == 0
    after = {path.name: path.stat().st_mtime_ns for path in out.glob("*.mp4")}
    assert {name for name in before if after[name] != before[name]} == {"left_slide-1.mp4"}
    lost = out / "run_02" / "0001_left_trimmed-slide.mp4"
    assert lost.samefile(clips["left_slide-1.mp4"])

    assert main(["evaluate", "physics_iq_verified", str(out), *settings]) == 0
    summary = json.loads((out / "scores" / "summary.json").read_text())
    assert summary["n"] == 8 and summary["failures"] == summary["missing"] == []
    runs = summary["metrics"]["score"]["runs"]
    assert [run["n"] for run in runs] == [2] * 4
    assert summary["metrics"]["score"]["deviation"] is not None
    # The published layout gives the same numbers.
    alone = evaluate("physics_iq_verified", out / "run_01", settings=settings[1::2])
    assert alone.summary.metrics["score"].percent == runs[0]["score"]


def test_what_cannot_become_a_score_is_refused_before_a_model_is_loaded(
    filmed: Path, model: Path, tmp_path: Path, twins: dict[str, Path], capsys: Any
) -> None:
    table = filmed / "descriptions_base.csv"
    made = ["generate", str(model), "--prompts", "physics_iq_verified", "--out", "made"]
    settings = ["--set", f"data={filmed}", "--set", f"descriptions={table}"]
    values = yaml.safe_load(model.read_text())

    def refused(*command: str) -> str:
        assert main(list(command)) == 1
        return " ".join(capsys.readouterr().err.split())

    def changed(**sections: dict[str, Any]) -> str:
        path = tmp_path / "changed.yaml"
        merged = {key: values[key] | section for key, section in sections.items()}
        path.write_text(yaml.safe_dump(values | merged))
        return str(path)

    assert "does not describe left_slide" in refused(*made, *settings[:2])
    other = ["generate", changed(generation={"fps": 7}), *made[2:], *settings]
    said = refused(*other)
    assert "no film with its mask at 7 frames a second" in said
    assert "of 2 prompts, the first is left_slide" in said
    other = ["generate", changed(data={"frames": 1}), *made[2:], *settings]
    assert "Clips of 1 frames" in refused(*other)
    text_alone = values["backbone"] | {"weights": str(twins["backbone"]), "name": "cogvideox"}
    other = ["generate", changed(backbone=text_alone), *made[2:], *settings]
    assert "takes text alone, and what is scored are continuations" in refused(*other)
    assert "--images are for lists" in refused(*made, *settings, "--images", str(filmed))
    assert "--set is for a benchmark's" in refused(*made[:3], str(table), *made[4:], *settings)
    (image,) = (filmed / VERIFIED / SWITCH).glob("0001*")
    Image.new("RGB", (64, 64)).save(image)
    assert "64x64 pixels, upright, and its film" in refused(*made, *settings)
    image.unlink()
    assert "has no switch frame of left_slide; expected switch-frames/" in refused(*made, *settings)
    assert not Path("made").exists()
