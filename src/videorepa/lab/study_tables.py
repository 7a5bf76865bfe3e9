"""What a study's scores say: a row for every clip, and the tables that follow from them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from videorepa.data.files import csv_text
from videorepa.errors import UserError
from videorepa.lab.study_recipe import BASE, StudyRecipe
from videorepa.statistics import holm, paired_bootstrap, sign_flip, wilson

SCORES = ("sa", "pc", "joint")
CHECKS_PASSED = "checks"
"""Share of PC's checks that a clip passes, of those that apply to it: 0 to 1."""
MEASURED = (CHECKS_PASSED, "motion")

Row = dict[str, Any]


def rows_text(rows: Sequence[Row]) -> str:
    """Rows as CSV: true as 1, false as 0, what is measured in four digits, and what does not apply
    left empty."""

    def cell(value: Any) -> Any:
        if isinstance(value, bool):
            return int(value)
        return f"{value:.4g}" if isinstance(value, float) else value

    columns = dict.fromkeys(key for row in rows for key in row)
    return csv_text(list(columns), [{key: cell(row[key]) for key in row} for row in rows])


def read_rows(path: Path) -> list[Row]:
    """The rows of a file that a study wrote. Raises UserError if it cannot be read."""

    def value(key: str, cell: str) -> Any:
        if key in SCORES or key.endswith("_passed"):
            return bool(int(cell))
        if key in ("seed", "step"):
            return int(cell)
        return float(cell) if key in MEASURED or key.endswith("_value") else cell

    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                {"step": None} | {key: value(key, cell) for key, cell in row.items() if cell}
                for row in csv.DictReader(file, strict=True)
            ]
        if any({"arm", "seed", "prompt_id", "caption", *SCORES, *MEASURED} - set(r) for r in rows):
            raise ValueError("a row lacks a score")
    except (OSError, ValueError, csv.Error, AttributeError, TypeError) as error:
        raise UserError(f"{path} holds no rows of a study: {error}") from None
    if not rows:
        raise UserError(f"{path} holds no rows of a study: it is empty")
    return rows


@dataclass(frozen=True)
class Difference:
    """An arm minus the control, in percentage points, over the clips of the same prompt and seed.

    low, high: 95 % interval by bootstrap over captions, so it is about other captions and noise,
        with these trainings; by_seed shows how far the trainings themselves differ. p: by flipping
        the signs of whole captions; p_holm: adjusted for the arms of its table. won, lost: clips
        that pass here alone, and in the control alone.
    """

    value: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]
    won: int
    lost: int
    p_holm: float = float("nan")


def compare(rows: Sequence[Row], control: Sequence[Row], score: str) -> Difference:
    """Raises UserError if the two share no clip."""
    theirs = {_clip(row): float(row[score]) for row in control}
    by_caption: dict[str, list[float]] = defaultdict(list)
    by_seed: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        other = theirs.get(_clip(row))
        if other is not None:
            difference = 100.0 * (row[score] - other)
            by_caption[row["caption"]].append(difference)
            by_seed[row["seed"]].append(difference)
    clusters = list(by_caption.values())
    if not clusters:
        raise UserError("The two arms share no clip: they need seeds and prompts in common.")
    every = [value for cluster in clusters for value in cluster]
    low, high = paired_bootstrap(clusters)
    return Difference(
        float(np.mean(every)),
        low,
        high,
        sign_flip(clusters),
        tuple(float(np.mean(by_seed[seed])) for seed in sorted(by_seed)),
        sum(value > 0 for value in every),
        sum(value < 0 for value in every),
    )


def family(
    arms: Mapping[str, Sequence[Row]], controls: Mapping[str, str], score: str
) -> dict[str, Difference]:
    """Arms in one score, each against the arm that is its control; p adjusted for one another."""
    found = {name: compare(arms[name], arms[by], score) for name, by in controls.items()}
    adjusted = holm([difference.p for difference in found.values()])
    return {
        name: replace(difference, p_holm=p)
        for (name, difference), p in zip(found.items(), adjusted, strict=True)
    }


def by_arm(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each arm at its end."""
    at_end: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["step"] is None:
            at_end[row["arm"]].append(row)
    return at_end


@dataclass(frozen=True)
class Table:
    """What arms of one table are like, in Markdown: their scores, how these differ from the
    control's, and the share of clips that each single check passes."""

    scores: str
    differences: str
    laws: str


def by_table(recipe: StudyRecipe, rows: Sequence[Row]) -> dict[str, Table]:
    """Every table's arms, with base, the control, and what is shown again by the table's clips."""
    at_end = by_arm(rows)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, arm in recipe.arms.items():
        if at_end[name]:
            groups[arm.table].append(name)
    found = {}
    for group, names in groups.items():
        clips = {_clip(row) for name in names for row in at_end[name]}
        of_these = {
            name: [row for row in at_end[name] if _clip(row) in clips]
            for name in dict.fromkeys((BASE, recipe.control, *recipe.again, *names))
        }
        shown = [name for name, there in of_these.items() if there]
        controls = {
            name: recipe.control_of(name)
            for name in shown
            if name not in (BASE, recipe.control) and of_these.get(recipe.control_of(name))
        }
        own = {name: control for name, control in controls.items() if name in names}
        again = {name: control for name, control in controls.items() if name not in names}
        against = {score: family(of_these, own, score) for score in (*SCORES, CHECKS_PASSED)}
        differences = _differences(against, own) if own else ""
        for score, of_score in against.items():  # No part of this table's family of tests.
            for name, control in again.items():
                of_score[name] = compare(of_these[name], of_these[control], score)
        found[group] = Table(
            _scores(recipe, of_these, shown, against), differences, _laws(of_these, shown)
        )
    return found


def _clip(row: Row) -> tuple[str, int]:
    return row["prompt_id"], row["seed"]


def tables(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    """Everything in Markdown: scores, differences to the control, single laws, and the curve."""
    parts = []
    for name, table in by_table(recipe, rows).items():
        parts += [f"### {name.capitalize()}", table.scores, table.differences, table.laws]
    if curve := _curve(recipe, rows):
        parts.append(f"### On the way\n\n{curve}")
    return "\n\n".join(part for part in parts if part) + "\n"


Against = Mapping[str, Mapping[str, Difference]]
"""By score, and by arm."""


def _scores(
    recipe: StudyRecipe, rows: dict[str, list[Row]], names: Sequence[str], against: Against
) -> str:
    lines = [
        "| arm | what it is | clips | SA | PC | joint | checks | motion, px "
        "| PC less control's | SA less control's |",
        "|---" * 10 + "|",
    ]
    for name in names:
        arm = recipe.arms.get(name)
        cells = [name, arm.about if arm else "the model all start from", str(len(rows[name]))]
        for score in SCORES:
            passed = sum(bool(row[score]) for row in rows[name])
            low, high = wilson(passed, len(rows[name]))
            share = 100 * passed / len(rows[name])
            cells.append(f"{share:.1f} [{100 * low:.0f}, {100 * high:.0f}]")
        checks, motion = (np.mean([row[key] for row in rows[name]]) for key in MEASURED)
        cells += [f"{100 * checks:.1f}", f"{motion:.1f}"]
        for score in ("pc", "sa"):
            cells.append(_points(against[score][name]) if name in against[score] else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _points(found: Difference) -> str:
    interval = f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
    return interval if np.isnan(found.p_holm) else f"{interval}, p {found.p_holm:.2f}"


def _differences(against: Against, controls: Mapping[str, str]) -> str:
    lines = [
        "| arm | against | score | points | 95 % | p | p, Holm | by seed | won, lost |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for score, arms in against.items():
        for name, difference in arms.items():
            seeds = ", ".join(f"{value:+.1f}" for value in difference.by_seed)
            lines.append(
                f"| {name} | {controls[name]} | {score} | {difference.value:+.1f} | "
                f"[{difference.low:+.1f}, {difference.high:+.1f}] | {difference.p:.4f} | "
                f"{difference.p_holm:.4f} | {seeds} | {difference.won}, {difference.lost} |"
            )
    return "\n".join(lines)


def _laws(rows: dict[str, list[Row]], names: Sequence[str]) -> str:
    """The share of clips that each check passes, of those it applies to."""
    every = {key for name in names for row in rows[name] for key in row if key.endswith("_passed")}
    laws = sorted(every)
    head = [law.removesuffix("_passed").replace("_", " ") for law in laws]
    lines = [f"| passed, % | {' | '.join(head)} |", "|---" * (1 + len(laws)) + "|"]
    for name in names:
        cells = []
        for law in laws:
            applies = [bool(row[law]) for row in rows[name] if law in row]
            cells.append(f"{100 * np.mean(applies):.0f}" if applies else "")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _curve(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    if recipe.curve is None:
        return ""
    first = recipe.seeds[0]
    known = {row["prompt_id"] for row in rows if row["step"] is not None}
    last = recipe.recipe.optim.steps
    lines = ["| arm | step | clips | SA | PC | joint |", "|---|---|---|---|---|---|"]
    for arm in recipe.curve.arms:
        by_step: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            if (row["arm"], row["seed"]) == (arm, first) and row["prompt_id"] in known:
                by_step[last if row["step"] is None else row["step"]].append(row)
        for step, found in sorted(by_step.items()):
            shares = (f"{100 * np.mean([bool(row[s]) for row in found]):.1f}" for s in SCORES)
            lines.append(f"| {arm} | {step} | {len(found)} | {' | '.join(shares)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
