"""VBench's own result files (Huang et al. 2024, arXiv 2311.17982), read, checked and compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from videorepa.artifacts.reading import json_object
from videorepa.artifacts.scores import Row
from videorepa.benchmarks import Benchmark
from videorepa.benchmarks._vbench import (
    DIMENSIONS,
    STILL,
    clip_of,
    differences_of,
    dimension_metric,
    in_percent,
    totals_of,
)
from videorepa.data.manifest import Prompt
from videorepa.errors import UserError
from videorepa.evaluation.pairs import Pairs
from videorepa.system.checks import finite_number
from videorepa.system.files import check_is_folder, parse_json, read_bytes

RESULTS = "*_eval_results.json"

UNITS = {"imaging_quality": 100.0}
"""What a clip's value is divided by to be in the unit of its dimension's mean, if not by 1."""

BY_FRAMES = (
    "background_consistency",
    "multiple_objects",
    "appearance_style",
    "subject_consistency",
    "object_class",
    "scene",
)
"""Dimensions whose published mean may be over frames, or of last frames, not over clips."""

COSINES = ("appearance_style", "temporal_style", "overall_consistency")


class VBenchResults(Benchmark):
    """What the official tool wrote: a folder with *_eval_results.json, and *_full_info.json.

    Each dimension's mean over clips in percent, and the totals that the dimensions suffice for.
    """

    name: Literal["vbench_results"] = "vbench_results"
    version: ClassVar[str] = "1"

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        raise UserError("The benchmark vbench_results has no prompts; VBench has them.")

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        raise UserError("The benchmark vbench_results scores no clips; VBench's own tool does.")

    def results(self, folder: Path) -> tuple[list[Row], list[dict[str, Any]]]:
        """A row for each clip and dimension in a folder's files, and the prompts without a clip.

        A clip is of the prompt that *_full_info.json names, or else of its file name's. A value
        that is no finite number is None. A row that comes twice, with the same value, counts once.

        Raises:
            UserError: There are no files, they are of another tool or version, or a clip has two
                values for a dimension.
        """
        check_is_folder(folder, f"what VBench wrote, {RESULTS}")
        prompts, missing = _full_info(folder)
        rows: dict[tuple[str, str], Row] = {}
        for path in sorted(folder.glob(RESULTS)):
            for dimension, entry in json_object(path).items():
                aggregate, clips = _checked(path, dimension, entry)
                for clip in clips:
                    row = _row(path, dimension, clip, prompts)
                    row["published"] = aggregate
                    earlier = rows.setdefault((row["prompt_id"], row["k"]), row)
                    if earlier is row:
                        continue
                    if earlier["value"] != row["value"] or earlier["file"] != row["file"]:
                        raise UserError(
                            f"{dimension} of {Path(row['video']).name} is in {folder} twice, in "
                            f"{earlier['file']} ({earlier['value']}) and in {row['file']} "
                            f"({row['value']}). Expected one run of the tool; take the other away."
                        )
                    earlier["repeated"] += 1
        if not rows:
            raise UserError(f"{folder} holds no {RESULTS} with clips; VBench's tool writes them.")
        return list(rows.values()), missing

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Totals and dimensions in percent, with bootstrap intervals over prompts.

        A dimension also has what `dimension_metric` gives; "published", the tool's own mean in
        percent; and "repeated", the number of rows that came again and are not counted.
        """
        metrics: dict[str, dict[str, Any]] = {}
        for dimension, of in _by_dimension(rows).items():
            published = {row["published"] for row in of}
            metrics[dimension] = dimension_metric(of, "value", dimension) | {
                "published": in_percent(published.pop()) if len(published) == 1 else None,
                "repeated": sum(row["repeated"] for row in of),
            }
        if "dynamic_degree" not in metrics and metrics.keys() & set(STILL):
            # Motion stands beside what a still clip is best at, even if nobody measured it.
            metrics["dynamic_degree"] = {"percent": None, "n": 0}
        return totals_of(_values(rows)) | metrics

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A in points, for totals and dimensions, over the clips that both have.

        p is that of flipping the signs of all differences of a prompt at once.
        """
        paired = Pairs.of(rows_a, rows_b)
        both = [(a, b) for a, b in paired.pairs if None not in (a["value"], b["value"])]
        differences = _values([b | {"value": b["value"] - a["value"]} for a, b in both])
        result: dict[str, Any] = differences_of(differences)
        for dimension in differences:
            of = [(a, b) for a, b in paired.pairs if a["dimension"] == dimension]
            result[dimension] = Pairs(of, 0).tested("value", 100.0)
        return result | {"unpaired": paired.unpaired}


def _by_dimension(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each dimension, in the order of `DIMENSIONS`."""
    by: dict[str, list[Row]] = {key: [] for key in DIMENSIONS}
    for row in rows:
        by[row["dimension"]].append(row)
    return {key: of for key, of in by.items() if of}


def _values(rows: Sequence[Row]) -> dict[str, dict[str, list[float]]]:
    """The valid values by dimension and prompt."""
    values: dict[str, dict[str, list[float]]] = {}
    for dimension, of in _by_dimension(rows).items():
        by_prompt: dict[str, list[float]] = defaultdict(list)
        for row in of:
            if row["value"] is not None:
                by_prompt[row["caption"]].append(row["value"])
        if by_prompt:
            values[dimension] = by_prompt
    return values


def _full_info(folder: Path) -> tuple[dict[str, str], list[dict[str, Any]]]:
    """The prompts by the names of their clips, and a list of the prompts without any."""
    prompts: dict[str, str] = {}
    missing = []
    for path in sorted(folder.glob("*_full_info.json")):
        entries = parse_json(read_bytes(path))
        if not (isinstance(entries, list) and all(isinstance(e, dict) for e in entries)):
            raise UserError(f"{path} is no list of prompts; expected the file that VBench wrote.")
        for entry in entries:
            prompt, clips = str(entry.get("prompt_en")), entry.get("video_list") or ()
            prompts |= {Path(clip).stem: prompt for clip in clips}
            if not clips:
                missing += [
                    {"prompt_id": f"{dimension}: {prompt}", "k": 0, "prompt": prompt}
                    for dimension in entry.get("dimension", ())
                ]
    return prompts, missing


def _checked(path: Path, dimension: str, entry: Any) -> tuple[float | None, list[dict[str, Any]]]:
    """A dimension's published mean and clips. Raises UserError unless they are VBench's."""
    if dimension not in DIMENSIONS:
        raise UserError(
            f"{path} has a dimension {dimension!r}; expected VBench's sixteen, such as "
            "subject_consistency. Files of VBench-2.0 and other tools are not read."
        )
    expected = 'expected [mean, [{"video_path": ..., "video_results": ...}, ...]]'
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[1], list)):
        raise UserError(
            f"{path}: {dimension} is {str(entry)[:60]}; {expected}. Score the clips with VBench "
            "0.1.5 or later."
        )
    aggregate, clips = entry
    for clip in clips:
        if not (isinstance(clip, dict) and {"video_path", "video_results"} <= clip.keys()):
            raise UserError(f"{path}: {dimension} has the clip {str(clip)[:60]}; {expected}.")
    values = [value for clip in clips if (value := _value(dimension, clip)) is not None]
    lowest = -1.0 if dimension in COSINES else 0.0
    fits = all(lowest <= value <= 1 + 1e-6 for value in values)
    if values and len(values) == len(clips) and dimension not in BY_FRAMES:
        fits = fits and abs(float(np.mean(values)) - (finite_number(aggregate) or 0.0)) < 1e-4
    if not fits:
        unit = UNITS.get(dimension, 1.0)
        raise UserError(
            f"{path}: {dimension} has the mean {aggregate}, and its clips' values are "
            f"{unit * min(values):.6g} to {unit * max(values):.6g}, {unit * np.mean(values):.6g} "
            f"on average; expected {unit * lowest:g} to {unit:g} and {unit:g} times the mean. "
            "The file was changed, or another version wrote it: score the clips with VBench 0.1.5."
        )
    return finite_number(aggregate), clips


def _row(path: Path, dimension: str, clip: dict[str, Any], prompts: dict[str, str]) -> Row:
    stem = Path(clip["video_path"]).stem
    named, k = clip_of(stem)
    prompt = prompts.get(stem) or named
    value = _value(dimension, clip)
    row: Row = {
        "prompt_id": f"{dimension}: {prompt}",
        "k": k,
        "scenario": None,
        "caption": prompt,
        "dimension": dimension,
        "value": value,
        "video": clip["video_path"],
        "file": path.name,
        "repeated": 0,
    }
    if value is None:
        row["invalid"] = {"value": f"{clip['video_results']!r} is no finite number"}
    return row


def _value(dimension: str, clip: dict[str, Any]) -> float | None:
    """A clip's value in the unit of its dimension's mean; None unless it is a finite number."""
    value = finite_number(clip["video_results"])
    return None if value is None else value / UNITS.get(dimension, 1.0)
