"""The scores of clips as `evaluate` leaves them in a folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from videorepa.artifacts.clips import Key
from videorepa.artifacts.reading import json_lines, json_object, leaves, parse
from videorepa.errors import UserError


@dataclass(frozen=True)
class Evaluation:
    """summary: the benchmark's metrics, in all and by scenario, and what could not be scored.
    comparison: against the other folder, if one was given. Both as they stand in `out`."""

    out: Path
    summary: dict[str, Any]
    comparison: dict[str, Any] | None = None


def result_folder(videos: Path, name: str) -> Path:
    """Where what is found about clips is kept: within their folder, or beside their list."""
    return videos.with_suffix(f".{name}") if videos.is_file() else videos / name


def clip_key(about: dict[str, Any]) -> tuple[str, int, Any]:
    return about["prompt_id"], about["k"], about.get("model_digest")


def known_rows(out: Path, same: dict[str, Any]) -> dict[tuple[str, int, Any], Row]:
    """The rows of all row files in which these keys have the same values."""
    known = {}
    for path in sorted(out.glob("scores*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # A killed process leaves half a line; its clip is scored again.
            if isinstance(row, dict) and {key: row.get(key) for key in same} == same:
                known[clip_key(row)] = row
    return known


class Metric(BaseModel):
    """A metric over a folder of clips: a share in percent or a mean, perhaps with an interval."""

    percent: float | None = None
    mean: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    invalid: int = 0


class Failure(BaseModel):
    """A clip that could not be scored."""

    prompt_id: str
    k: int
    reason: str


class Summary(BaseModel):
    """A benchmark's metrics over a folder of clips, in all and by scenario.

    about: what the metrics are, in a sentence, where the benchmark says it.
    """

    benchmark: str
    version: str
    about: str | None = None
    metrics: dict[str, Metric]
    by_scenario: dict[str, dict[str, Metric]] = {}
    failures: list[Failure] = []
    missing: list[dict[str, Any]] = []


class Difference(BaseModel):
    """A paired difference to another model, in the metric's own unit (points for a percentage).

    n: pairs. prompts: that they are of, where a prompt may have several.
    """

    difference: float
    low: float
    high: float
    p: float | None = None
    n: int | None = None
    prompts: int | None = None

    @property
    def has_interval(self) -> bool:
        """Not if all pairs differ alike: drawing them anew then gives no other difference."""
        return self.low < self.high

    @property
    def independent(self) -> int | None:
        """How many pairs tell independently of each other, if it is known."""
        return self.n if self.prompts is None else self.prompts


class Comparison(BaseModel):
    against: str
    metrics: dict[str, Difference]
    by_scenario: dict[str, dict[str, Difference]] = {}


class ScoreRow(BaseModel):
    """One clip's scores; what a benchmark writes beside them are its checks."""

    model_config = ConfigDict(extra="allow")

    prompt_id: str
    k: int
    scenario: str | None = None
    sa: float | None = None
    pc: float | None = None
    vq: float | None = None
    joint: float | None = None
    motion: float | None = None

    @property
    def failing_checks(self) -> list[str]:
        """The names of the checks that say False: `gravity` for `checks.gravity_passed`."""
        return [
            name.rpartition(".")[2].removesuffix("_passed").replace("_", " ")
            for name, value in leaves(self.model_extra or {})
            if value is False
        ]

    def flag(self, metric: str) -> bool | None:
        """Whether the clip passes, where the metric is a share of clips that do."""
        value = getattr(self, metric, None)
        return bool(value) if value in (0, 1) else None


@dataclass(frozen=True)
class Scores:
    folder: Path
    summary: Summary
    rows: Mapping[Key, ScoreRow]
    comparison: Comparison | None

    @property
    def failures(self) -> dict[Key, str]:
        return {(item.prompt_id, item.k): item.reason for item in self.summary.failures}


def score_folders(clips: Path) -> list[Path]:
    """What `evaluate` has left of a folder or a list of clips."""
    if not clips.is_file():
        return [path.parent for path in sorted(clips.glob("*/summary.json"))]
    beside = sorted(clips.parent.glob("*/summary.json"))
    return [path.parent for path in beside if path.parent.stem == clips.stem]


def read_scores(folder: Path) -> Scores:
    """Read a score folder. Raises UserError when a file is missing or damaged."""
    table = folder / "scores.jsonl"
    if not table.is_file() or not (folder / "summary.json").is_file():
        raise UserError(
            f"{folder} is not a score folder. Expected scores.jsonl and summary.json in it; "
            "`videorepa evaluate` writes them."
        )
    rows = [parse(ScoreRow, row, str(table)) for row in json_lines(table)]
    path = folder / "summary.json"
    comparison = folder / "comparison.json"
    return Scores(
        folder=folder,
        summary=parse(Summary, json_object(path), str(path)),
        rows={(row.prompt_id, row.k): row for row in rows},
        comparison=parse(Comparison, json_object(comparison), str(comparison))
        if comparison.is_file()
        else None,
    )


Row = dict[str, Any]
