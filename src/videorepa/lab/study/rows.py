"""The rows of a study, one for each generated clip: their file, and their means by model."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from videorepa.artifacts.scores import PASSED
from videorepa.benchmarks.continuation import means
from videorepa.errors import UserError
from videorepa.lab.study.measures import ALL
from videorepa.system.files import check_is_file, csv_text

SCORES = ("sa", "pc", "joint")

CHECKS_PASSED = "checks"
"""Share of PC's checks that a clip passes, among those that apply to it, in [0, 1]."""

VIOLATION = "violation"
"""How far a clip is from the laws: the mean over PC's checks that apply of log2(value / tolerance),
each clipped to -2 to 3. It is 0 at the tolerances and 1 at twice these. Lower is better."""

GRADED = (CHECKS_PASSED, VIOLATION, "motion")

CONTINUED = (*means(), "lost", "compared")
"""What clips have that continue a first frame."""

Row = dict[str, Any]


def rows_text(rows: Sequence[Row]) -> str:
    """Rows as CSV. True is 1, False is 0, floats have four digits, and missing values are empty."""

    def cell(value: Any) -> Any:
        if isinstance(value, bool):
            return int(value)
        return f"{value:.4g}" if isinstance(value, float) else value

    columns = dict.fromkeys(key for row in rows for key in row)
    return csv_text(list(columns), [{key: cell(row[key]) for key in row} for row in rows])


def read_rows(path: Path) -> list[Row]:
    """Read the rows of a study.

    Raises:
        UserError: The file cannot be read or lacks scores.
    """

    def value(key: str, cell: str) -> Any:
        if key in SCORES or key.endswith(PASSED):
            return bool(int(cell))
        if key in ("seed", "step"):
            return int(cell)
        is_number = key in (*GRADED, *CONTINUED) or key.endswith("_value")
        return float(cell) if is_number else cell

    try:
        check_is_file(path)
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                {"step": None} | {key: value(key, cell) for key, cell in row.items() if cell}
                for row in csv.DictReader(file, strict=True)
            ]
        if any({"arm", "seed", "prompt_id", "caption", *SCORES, *GRADED} - set(r) for r in rows):
            raise ValueError("a row lacks a score")
    except (OSError, ValueError, csv.Error, AttributeError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} holds no rows of a study: {reason}") from None
    if not rows:
        raise UserError(f"{path} holds no rows of a study: it is empty")
    return rows


def means_of_clips(rows: Sequence[Row]) -> Iterator[Row]:
    """The mean scores of each model's clips, in the form of what is measured without clips.

    Shares are in percent. Clips that were made on the way are left out, and prompts that one of a
    seed's models has no clip of, so that a gain is over the same prompts.
    """
    by_model: dict[tuple[str, int], list[Row]] = defaultdict(list)
    for row in rows:
        if row["step"] is None:
            by_model[row["arm"], row["seed"]].append(row)
    shared: dict[int, set[str]] = {}
    for (_, seed), clips in by_model.items():
        prompts = {clip["prompt_id"] for clip in clips}
        shared[seed] = shared.get(seed, prompts) & prompts
    for (arm, seed), made in by_model.items():
        clips = [clip for clip in made if clip["prompt_id"] in shared[seed]]
        if not clips:
            continue
        for score in (*SCORES, *GRADED):
            unit = 100.0 if score in (*SCORES, CHECKS_PASSED) else 1.0
            value = unit * float(np.mean([clip[score] for clip in clips]))
            about = {"arm": arm, "seed": seed, "measure": score, "part": ALL}
            yield about | {"value": value, "n": len(clips)}
