"""VBench's result files: totals as on its board, rows and intervals, comparisons, and files that do
not fit."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from videorepa.benchmarks._vbench import DIMENSIONS, scaled, totals
from videorepa.benchmarks.vbench_results import VBenchResults
from videorepa.cli import main
from videorepa.errors import UserError
from videorepa.evaluate import evaluate

# The board's order: quality, then semantic.
BOARD = {
    "CogVideoX-5B": (
        (96.23, 96.52, 98.66, 96.92, 70.97, 61.98, 62.90)
        + (85.23, 62.11, 99.40, 82.81, 66.35, 53.20, 24.91, 25.38, 27.59),
        (81.61, 82.75, 77.04),
    ),
    "CogVideoX-2B": (
        (96.42, 96.53, 98.45, 97.76, 58.33, 61.47, 65.60)
        + (87.81, 69.35, 97.00, 86.87, 54.64, 57.51, 24.93, 25.56, 28.01),
        (81.57, 82.51, 77.79),
    ),
}


@pytest.mark.parametrize("model", BOARD)
def test_totals_of_the_boards_dimensions_are_the_boards_totals(model: str) -> None:
    values, expected = BOARD[model]
    means = dict(zip(DIMENSIONS, np.array(values) / 100, strict=True))
    of = totals(means)
    assert [100 * of[key] for key in ("total", "quality", "semantic")] == pytest.approx(
        expected, abs=0.011
    )


def test_no_total_is_made_of_fewer_dimensions() -> None:
    means = dict.fromkeys(DIMENSIONS, 0.9)
    assert totals(means).keys() == {"total", "quality", "semantic"}
    for left_out in DIMENSIONS:
        of = totals({key: mean for key, mean in means.items() if key != left_out})
        assert of.keys() == {"quality", "semantic"} - {DIMENSIONS[left_out].total}
    # Entered as 0, as the published script does it, it would even count below 0.
    assert scaled("temporal_flickering", 0.0) < -1.6


# Files.

PROMPTS = [f"a {thing}-{n} on / off" for n in range(3) for thing in ("cat", "dog")]


def files(folder: Path, seed: int = 0, gain: float = 0.0, only: Any = DIMENSIONS) -> Path:
    """What the tool writes for two samples of each prompt, two dimensions a file.

    The quality dimensions share their prompts, and the semantic ones have the first four.
    """
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    results: dict[str, Any] = {}
    for key, dimension in DIMENSIONS.items():
        if key not in only:
            continue
        clips = []
        for number, prompt in enumerate(PROMPTS[: 6 if dimension.total == "quality" else 4]):
            for k in range(2):
                value: Any = 0.5 + 0.05 * number + gain + 0.02 * rng.normal()
                if key == "dynamic_degree":
                    value = bool((number + k) % 2)
                value = 100 * value if key == "imaging_quality" else value
                name = f"clips/{prompt.replace('/', '_')}-{k}.mp4"
                clips.append({"video_path": name, "video_results": value, "frame_count": 16})
        centre = float(np.mean([clip["video_results"] for clip in clips]))
        results[key] = [centre / 100 if key == "imaging_quality" else centre, clips]
    keys = list(results)
    for place in range(0, len(keys), 2):
        part = {key: results[key] for key in keys[place : place + 2]}
        (folder / f"run{place}_eval_results.json").write_text(json.dumps(part))
    info = [
        {
            "prompt_en": prompt,
            "dimension": ["subject_consistency"],
            "video_list": [f"clips/{prompt.replace('/', '_')}-{k}.mp4" for k in range(2)],
        }
        for prompt in PROMPTS
    ]
    info.append({"prompt_en": "a bird", "dimension": ["scene", "color"], "video_list": []})
    (folder / "run_full_info.json").write_text(json.dumps(info))
    return folder


def changed(folder: Path, dimension: str, change: Any) -> Path:
    """Replace a dimension's entry by what `change` makes of it."""
    for path in folder.glob("*_eval_results.json"):
        results = json.loads(path.read_text())
        if dimension in results:
            results[dimension] = change(results[dimension])
            path.write_text(json.dumps(results))
            return folder
    raise AssertionError(dimension)


def test_rows_means_and_totals_of_a_folder(tmp_path: Path, capsys: Any) -> None:
    folder = files(tmp_path / "a")
    evaluation = evaluate("vbench_results", folder)
    summary, rows = evaluation.summary, evaluation.rows
    assert len(rows) == 7 * 12 + 9 * 8 and rows[0]["benchmark"] == "vbench_results 1"
    assert {row["caption"] for row in rows} == set(PROMPTS), "as the prompt has it, not the file"
    assert {row["k"] for row in rows} == {0, 1}
    assert [p["prompt_id"] for p in summary.missing] == ["scene: a bird", "color: a bird"]
    for key in DIMENSIONS:
        values = [row["value"] for row in rows if row["dimension"] == key]
        metric = summary.metrics[key].model_dump()
        assert metric["percent"] == pytest.approx(100 * np.mean(values))
        assert metric["percent"] == pytest.approx(metric["published"])
        assert metric["low"] <= metric["percent"] <= metric["high"]
        assert metric["prompts"] in (4, 6) and metric["of_prompts"] == DIMENSIONS[key].prompts
    means = {key: summary.metrics[key].percent / 100 for key in DIMENSIONS}
    for name, value in totals(means).items():
        metric = summary.metrics[name]
        assert metric.percent == pytest.approx(100 * value)
        assert metric.low < metric.percent < metric.high
    assert main(["evaluate", "vbench_results", str(folder)]) == 0
    assert f"total {summary.metrics['total'].percent:5.1f} [" in capsys.readouterr().out


def test_the_interval_of_a_total_is_that_of_drawing_prompts(tmp_path: Path) -> None:
    """All quality dimensions have the same prompts: draw those, and compute everything anew."""
    quality = [key for key, of in DIMENSIONS.items() if of.total == "quality"]
    evaluation = evaluate("vbench_results", files(tmp_path / "a", only=quality))
    assert "total" not in evaluation.summary.metrics
    by_prompt = np.array(
        [
            [
                np.mean(
                    [r["value"] for r in evaluation.rows if (r["dimension"], r["caption"]) == p]
                )
                for p in ((key, prompt) for key in quality)
            ]
            for prompt in PROMPTS
        ]
    )
    drawn = by_prompt[np.random.default_rng(5).integers(0, 6, (20_000, 6))].mean(1)
    expected = 100 * np.array(totals(dict(zip(quality, drawn.T, strict=True)))["quality"])
    metric = evaluation.summary.metrics["quality"]
    low, high = np.quantile(expected, [0.025, 0.975])
    # Means of six nearly equal steps lie near a lattice, of which the quantiles are points. Drawn
    # apart, dimension by dimension, the prompts would give less than half of the width.
    assert abs(metric.low - low) < 1 and abs(metric.high - high) < 1 and high - low > 8


def test_a_comparison_is_paired_and_swapping_the_models_mirrors_it(tmp_path: Path) -> None:
    a, b = files(tmp_path / "a"), files(tmp_path / "b", seed=1, gain=0.05)
    forward = evaluate("vbench_results", b, against=a).comparison
    back = evaluate("vbench_results", a, against=b).comparison
    assert forward is not None and back is not None and forward.unpaired == 0
    assert forward.metrics.keys() == {*DIMENSIONS, "total", "quality", "semantic"}
    gain = forward.metrics["aesthetic_quality"]
    assert gain.difference == pytest.approx(5, abs=2) and 0 < gain.low < gain.difference < gain.high
    for key, one in forward.metrics.items():
        other = back.metrics[key]
        assert one.difference == pytest.approx(-other.difference)
        assert (one.p, one.p_holm) == pytest.approx((other.p, other.p_holm))
        assert one.low <= one.difference <= one.high and one.p_holm >= one.p
    of = [evaluate("vbench_results", f).summary.metrics["total"].percent for f in (a, b)]
    assert forward.metrics["total"].difference == pytest.approx(of[1] - of[0])
    same = evaluate("vbench_results", a, against=a).comparison
    assert same is not None and same.metrics["total"].p == 1


def test_what_is_no_number_is_counted_and_never_0(tmp_path: Path) -> None:
    def broken(entry: list[Any]) -> list[Any]:
        for clip, value in zip(entry[1], (math.nan, None, 10**400), strict=False):
            clip["video_results"] = value
        return [math.nan, entry[1]]

    folder = changed(files(tmp_path / "a"), "aesthetic_quality", broken)
    evaluation = evaluate("vbench_results", folder)
    of = [row for row in evaluation.rows if row["dimension"] == "aesthetic_quality"]
    metric = evaluation.summary.metrics["aesthetic_quality"].model_dump()
    assert (metric["n"], metric["invalid"], metric["published"]) == (9, 3, None)
    assert metric["percent"] == pytest.approx(100 * np.mean([row["value"] for row in of[3:]]))
    assert of[0]["invalid"] == {"value": "nan is no finite number"}
    assert "NaN" not in (folder / "scores" / "scores.jsonl").read_text()
    # A whole dimension without a value gives no total.
    none = changed(
        folder, "aesthetic_quality", lambda e: [0, [c | {"video_results": None} for c in e[1]]]
    )
    metrics = evaluate("vbench_results", none).summary.metrics
    assert metrics["aesthetic_quality"].percent is None
    assert metrics.keys() & {"total", "quality", "semantic"} == {"semantic"}


def test_what_a_still_clip_is_best_at_never_stands_without_motion(
    tmp_path: Path, capsys: Any
) -> None:
    folder = files(tmp_path / "a", only=["subject_consistency", "temporal_flickering"])
    assert main(["evaluate", "vbench_results", str(folder)]) == 0
    assert "dynamic_degree none" in capsys.readouterr().out


def test_a_row_that_comes_again_counts_once_and_a_rerun_is_refused(tmp_path: Path) -> None:
    folder = files(tmp_path / "a")
    before = evaluate("vbench_results", folder).summary.metrics["scene"]
    changed(folder, "scene", lambda entry: [entry[0], [*entry[1], entry[1][0]]])
    after = evaluate("vbench_results", folder).summary.metrics["scene"].model_dump()
    assert (after["percent"], after["n"], after["repeated"]) == (before.percent, before.n, 1)
    other = entry_of(folder, "color")
    other[1][0]["video_results"] += 0.1
    (folder / "rerun_eval_results.json").write_text(json.dumps({"color": other}))
    with pytest.raises(UserError, match="color .* is in .* twice, in .* and in "):
        evaluate("vbench_results", folder)


def entry_of(folder: Path, dimension: str) -> Any:
    found = (json.loads(path.read_text()) for path in folder.glob("*_eval_results.json"))
    entry = next(results[dimension] for results in found if dimension in results)
    entry[0] = float(np.mean([c["video_results"] for c in entry[1]])) + 0.1 / len(entry[1])
    return entry


@pytest.mark.parametrize(
    ("dimension", "change", "says"),
    [
        ("color", lambda entry: entry[0], "expected .mean, .*VBench 0.1.5"),
        (
            "color",
            lambda entry: [entry[0], [[c["video_path"], 1] for c in entry[1]]],
            "has the clip",
        ),
        ("color", lambda entry: [entry[0] - 0.1, entry[1]], "The file was changed, or another"),
        (
            "imaging_quality",
            lambda entry: [
                entry[0],
                [c | {"video_results": c["video_results"] / 100} for c in entry[1]],
            ],
            "expected 0 to 100 and 100 times the mean",
        ),
        (
            "scene",
            lambda entry: (
                [100 * entry[0]]
                + [[c | {"video_results": 100 * c["video_results"]} for c in entry[1]]]
            ),
            "expected 0 to 1 ",
        ),
    ],
)
def test_files_of_other_versions_are_refused(
    tmp_path: Path, dimension: str, change: Any, says: str
) -> None:
    with pytest.raises(UserError, match=says):
        VBenchResults().results(changed(files(tmp_path / "a"), dimension, change))


def test_files_of_other_tools_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no .*_eval_results.json"):
        VBenchResults().results(tmp_path)
    (tmp_path / "x_eval_results.json").write_text(json.dumps({"Mechanics": [0.5, []]}))
    with pytest.raises(UserError, match="dimension 'Mechanics'; expected VBench's sixteen"):
        evaluate("vbench_results", tmp_path)
    with pytest.raises(UserError, match="nowhere"):
        evaluate("vbench_results", files(tmp_path / "a"), against=tmp_path / "nowhere")
