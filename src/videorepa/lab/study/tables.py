"""What a study's scores say: a row for every clip, and the tables that follow from them."""

from __future__ import annotations

import csv
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from videorepa.errors import UserError
from videorepa.evaluation.statistics import holm, paired_bootstrap, sign_flip, wilson
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.system.files import csv_text

SCORES = ("sa", "pc", "joint")

CHECKS_PASSED = "checks"
"""Share of PC's checks that a clip passes, of those that apply to it: 0 to 1."""

VIOLATION = "violation"
"""How far a clip is from the laws: log2(value / tolerance), each held between -2 and 3, mean over
PC's checks that apply. 0 is at the tolerances, 1 at twice these; less is better."""

MEASURED = (CHECKS_PASSED, VIOLATION, "motion")

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
class ArmDifference:
    """An arm minus the control over the clips of the same prompt and seed: in percentage points, of
    violations in their own unit.

    low, high: 95 % interval by bootstrap over captions, so it is about other captions and noise,
        with these trainings; by_seed shows how far the trainings themselves differ. p: by flipping
        the signs of whole captions; p_holm: adjusted for the arms of its table. won, lost: clips
        with a higher value here, and in the control; of shares, those that pass in one alone.
    """

    value: float
    low: float
    high: float
    p: float
    by_seed: tuple[float, ...]
    won: int
    lost: int
    p_holm: float = float("nan")


def compare(rows: Sequence[Row], control: Sequence[Row], score: str) -> ArmDifference:
    """Raises UserError if the two share no clip."""
    theirs = {_clip(row): float(row[score]) for row in control}
    by_caption: dict[str, list[float]] = defaultdict(list)
    by_seed: dict[int, list[float]] = defaultdict(list)
    unit = 1.0 if score == VIOLATION else 100.0
    for row in rows:
        other = theirs.get(_clip(row))
        if other is not None:
            difference = unit * (row[score] - other)
            by_caption[row["caption"]].append(difference)
            by_seed[row["seed"]].append(difference)
    clusters = list(by_caption.values())
    if not clusters:
        raise UserError("The two arms share no clip: they need seeds and prompts in common.")
    every = [value for cluster in clusters for value in cluster]
    low, high = paired_bootstrap(clusters)
    return ArmDifference(
        float(np.mean(every)),
        low,
        high,
        sign_flip(clusters),
        tuple(float(np.mean(by_seed[seed])) for seed in sorted(by_seed)),
        sum(value > 0 for value in every),
        sum(value < 0 for value in every),
    )


class ArmTable:
    """Arms that are one family of tests, with base, the control and what is shown again beside
    them, all by the clips that the table's own arms have.

    names: its own arms, those that are done.
    """

    def __init__(
        self, recipe: StudyRecipe, names: Sequence[str], at_end: Mapping[str, Sequence[Row]]
    ) -> None:
        self.recipe, self.names = recipe, names
        clips = {_clip(row) for name in names for row in at_end[name]}
        again = [name for name in (BASE, recipe.control, *recipe.again) if name not in names]
        found = {
            name: [row for row in at_end.get(name, ()) if _clip(row) in clips]
            for name in (*again, *names)
        }
        self.rows = {name: rows for name, rows in found.items() if rows}
        self._against: dict[str, dict[str, ArmDifference]] = {}

    def against(self, score: str) -> dict[str, ArmDifference]:
        """Each own arm less the arm that is its control, with p adjusted for one another; and so
        what is shown again, which is no part of this table's family and has no adjusted p."""
        if score not in self._against:
            found = {
                name: compare(rows, self.rows[self.recipe.control_of(name)], score)
                for name, rows in self.rows.items()
                if name not in (BASE, self.recipe.control)
                and self.recipe.control_of(name) in self.rows
            }
            own = [name for name in found if name in self.names]
            adjusted = holm([found[name].p for name in own])
            for name, p in zip(own, adjusted, strict=True):
                found[name] = replace(found[name], p_holm=p)
            self._against[score] = found
        return self._against[score]

    def scores(self) -> str:
        """The paper's table, in Markdown: shares with intervals, and PC and SA less control's."""
        return in_markdown([self.scores_of(name) for name in self.rows])

    def scores_of(self, name: str) -> dict[str, str]:
        """An arm's row of it, by column."""
        arm, rows = self.recipe.arms.get(name), self.rows[name]
        cells = {"arm": name, "what it is": arm.about if arm else "the model all start from"}
        cells["clips"] = str(len(rows))
        for title, score in zip(("SA", "PC", "joint"), SCORES, strict=True):
            cells[title] = _share([bool(row[score]) for row in rows])
        checks, violation, motion = (np.mean([row[key] for row in rows]) for key in MEASURED)
        cells |= {"checks": f"{100 * checks:.1f}", "violation": f"{violation:.3f}"}
        cells["motion, px"] = f"{motion:.1f}"
        for title, score in {"PC": "pc", "SA": "sa"}.items():
            found = self.against(score).get(name)
            cells[f"{title} less control's"] = _points(found) if found else ""
        return cells

    def differences(self) -> str:
        """How its own arms differ from their controls in every score, in Markdown, if any does."""
        lines = [
            "| arm | against | score | difference | 95 % | p | p, Holm | by seed | higher, lower |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for score in (*SCORES, CHECKS_PASSED, VIOLATION):
            digits = "+.3f" if score == VIOLATION else "+.1f"
            for name, found in self.against(score).items():
                if name not in self.names:
                    continue
                seeds = ", ".join(f"{value:{digits}}" for value in found.by_seed)
                lines.append(
                    f"| {name} | {self.recipe.control_of(name)} | {score} "
                    f"| {found.value:{digits}} | [{found.low:{digits}}, {found.high:{digits}}] "
                    f"| {found.p:.4f} | "
                    f"{found.p_holm:.4f} | {seeds} | {found.won}, {found.lost} |"
                )
        return "\n".join(lines) if len(lines) > 2 else ""

    def laws(self) -> str:
        """The share of clips that each check passes, of those it applies to, in Markdown."""
        every = {key for rows in self.rows.values() for row in rows for key in row}
        laws = sorted(key for key in every if key.endswith("_passed"))
        head = [law.removesuffix("_passed").replace("_", " ") for law in laws]
        lines = [f"| passed, % | {' | '.join(head)} |", "|---" * (1 + len(laws)) + "|"]
        for name, rows in self.rows.items():
            cells = []
            for law in laws:
                applies = [bool(row[law]) for row in rows if law in row]
                cells.append(f"{100 * np.mean(applies):.0f}" if applies else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def in_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of one set of columns, as a table."""
    head = [list(rows[0]), ["---"] * len(rows[0])]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (*head, *(r.values() for r in rows)))


def by_table(recipe: StudyRecipe, rows: Sequence[Row]) -> dict[str, ArmTable]:
    at_end: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["step"] is None:
            at_end[row["arm"]].append(row)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, arm in recipe.arms.items():
        if at_end[name]:
            groups[arm.table].append(name)
    return {group: ArmTable(recipe, names, at_end) for group, names in groups.items()}


def tables(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    """Everything in Markdown: scores, differences to the control, single laws, and the curve."""
    parts = []
    for name, table in by_table(recipe, rows).items():
        parts += [f"### {name.capitalize()}", table.scores(), table.differences(), table.laws()]
    if curve := _curve(recipe, rows):
        parts.append(f"### On the way\n\n{curve}")
    return "\n\n".join(part for part in parts if part) + "\n"


def _clip(row: Row) -> tuple[str, int]:
    return row["prompt_id"], row["seed"]


def _share(passed: Sequence[bool]) -> str:
    low, high = wilson(sum(passed), len(passed))
    return f"{100 * np.mean(passed):.1f} [{100 * low:.0f}, {100 * high:.0f}]"


def _points(found: ArmDifference) -> str:
    interval = f"{found.value:+.1f} [{found.low:+.1f}, {found.high:+.1f}]"
    return interval if np.isnan(found.p_holm) else f"{interval}, p {found.p_holm:.2f}"


def on_the_way(recipe: StudyRecipe, rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """The curve's arms and their rows by step, of the same clips at each; base is step 0."""
    first = recipe.seeds[0]
    known = {row["prompt_id"] for row in rows if row["step"] is not None}
    found: dict[str, dict[int, list[Row]]] = {}
    for arm in recipe.curve.arms if recipe.curve else ():
        end = {BASE: 0, arm: recipe.trained(arm, first).optim.steps}
        at_step: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            if row["arm"] in end and row["seed"] == first and row["prompt_id"] in known:
                at_step[end[row["arm"]] if row["step"] is None else row["step"]].append(row)
        if set(at_step) - {0}:
            found[arm] = dict(sorted(at_step.items()))
    return found


def _curve(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    lines = ["| arm | step | clips | SA | PC | joint |", "|---|---|---|---|---|---|"]
    for arm, by_step in on_the_way(recipe, rows).items():
        for step, found in by_step.items():
            shares = (_share([bool(row[score]) for row in found]) for score in SCORES)
            lines.append(f"| {arm} | {step} | {len(found)} | {' | '.join(shares)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
