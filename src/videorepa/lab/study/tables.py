"""The tables of a study's clips, in which the caption is the unit."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from videorepa.artifacts.scores import PASSED
from videorepa.benchmarks.continuation import ERRORS
from videorepa.errors import UserError
from videorepa.evaluation.pairs import mean, share
from videorepa.evaluation.statistics import holm, paired_bootstrap, sign_flip
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.lab.study.rows import CHECKS_PASSED, GRADED, SCORES, VIOLATION, Row, read_rows
from videorepa.lab.study.seeds import in_markdown, measured_tables, read_measured

ERROR_TITLES = {ERRORS[0]: "position off, px", ERRORS[1]: "velocity off, px/frame"}


@dataclass(frozen=True)
class ArmDifference:
    """An arm minus its control, over the clips of the same prompts and seeds.

    Violations and errors are in their own units and all other scores in percentage points.

    Attributes:
        low: Lower end of the 95 % interval, by bootstrap over captions. The interval covers other
            captions and noise with these trainings; `by_seed` shows how trainings differ.
        high: Upper end of the interval.
        p: P-value, by flipping the signs of captions. See `sign_flip`.
        by_seed: The difference for each seed.
        won: Number of clips with a higher value in the arm.
        lost: Number of clips with a higher value in the control.
        p_holm: The p-value adjusted for the arms of the table.
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
    """Compare an arm with its control in one score.

    Raises:
        UserError: The two have no clip in common.
    """
    theirs = {_clip(row): float(row[score]) for row in control if score in row}
    by_caption: dict[str, list[float]] = defaultdict(list)
    by_seed: dict[int, list[float]] = defaultdict(list)
    unit = 1.0 if score in (VIOLATION, *ERRORS) else 100.0
    for row in rows:
        other = theirs.get(_clip(row))
        if other is not None and score in row:
            difference = unit * (row[score] - other)
            by_caption[row["caption"]].append(difference)
            by_seed[row["seed"]].append(difference)
    clusters = list(by_caption.values())
    if not clusters:
        raise UserError("The two arms share no clip. They need seeds and prompts in common.")
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
    """Arms that are one family of tests.

    The table also shows base, the control and the arms of `recipe.again`. All are scored on the
    clips that the table's own arms have.

    Args:
        names: The table's own arms that are finished.
        at_end: The rows of every arm at the end of its training.
    """

    def __init__(
        self, recipe: StudyRecipe, names: Sequence[str], at_end: Mapping[str, Sequence[Row]]
    ) -> None:
        self.recipe, self.names = recipe, names
        clips = {_clip(row) for name in names for row in at_end[name]}
        again = [name for name in (BASE, recipe.control, *recipe.again) if name not in names]
        rows = {
            name: [row for row in at_end.get(name, ()) if _clip(row) in clips]
            for name in (*again, *names)
        }
        self.rows = {name: shown for name, shown in rows.items() if shown}
        self._against: dict[str, dict[str, ArmDifference]] = {}

    def against(self, score: str) -> dict[str, ArmDifference]:
        """The differences of all arms from their controls in one score.

        The table's own arms have p-values adjusted for one another. Repeated arms belong to another
        family and have none.
        """
        if score not in self._against:
            differences = {
                name: compare(rows, self.rows[self.recipe.control_of(name)], score)
                for name, rows in self.rows.items()
                if name not in (BASE, self.recipe.control)
                and self.recipe.control_of(name) in self.rows
            }
            own = [name for name in differences if name in self.names]
            adjusted = holm([differences[name].p for name in own])
            for name, p in zip(own, adjusted, strict=True):
                differences[name] = replace(differences[name], p_holm=p)
            self._against[score] = differences
        return self._against[score]

    def scores(self) -> str:
        """Scores with intervals, and differences from the controls in PC and SA, in Markdown."""
        return in_markdown([self.scores_of(name) for name in self.rows])

    def scores_of(self, name: str) -> dict[str, str]:
        """An arm's row of `scores`, by column."""
        arm, rows = self.recipe.arms.get(name), self.rows[name]
        cells = {"arm": name, "what it is": arm.about if arm else "the model all start from"}
        cells["clips"] = str(len(rows))
        for title, score in zip(("SA", "PC", "joint"), SCORES, strict=True):
            cells[title] = _share(rows, score)
        checks, violation, motion = (np.mean([row[key] for row in rows]) for key in GRADED)
        cells |= {"checks": f"{100 * checks:.1f}", "violation": f"{violation:.3f}"}
        cells["motion, px"] = f"{motion:.1f}"
        for key in self.errors:
            of, copied = mean(_with(key, rows), key), mean(_with(key, rows), f"static_{key}")
            cells[ERROR_TITLES[key]] = f"{of['mean']:.2f} [{of['low']:.2f}, {of['high']:.2f}]"
            cells[f"{ERROR_TITLES[key]}, a copy"] = f"{copied['mean']:.2f}"
        for title, score in {"PC": "pc", "SA": "sa"}.items():
            difference = self.against(score).get(name)
            cells[f"{title} less control's"] = _points(difference) if difference else ""
        return cells

    @property
    def errors(self) -> list[str]:
        """The errors that clips have, if they continue first frames."""
        every = [row for rows in self.rows.values() for row in rows]
        return [key for key in ERRORS if _with(key, every)]

    def differences(self) -> str:
        """Differences of the table's own arms from their controls in every score, in Markdown.

        It is "" without such an arm.
        """
        lines = [
            "| arm | against | score | difference | 95 % | p | p, Holm | by seed | higher, lower |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        for score in (*SCORES, CHECKS_PASSED, VIOLATION, *self.errors):
            digits = "+.3f" if score in (VIOLATION, *ERRORS) else "+.1f"
            for name, d in self.against(score).items():
                if name not in self.names:
                    continue
                seeds = ", ".join(f"{value:{digits}}" for value in d.by_seed)
                lines.append(
                    f"| {name} | {self.recipe.control_of(name)} | {score} "
                    f"| {d.value:{digits}} | [{d.low:{digits}}, {d.high:{digits}}] "
                    f"| {d.p:.4f} | {d.p_holm:.4f} | {seeds} | {d.won}, {d.lost} |"
                )
        return "\n".join(lines) if len(lines) > 2 else ""

    def laws(self) -> str:
        """The share of clips that pass each check, of those to which it applies, in Markdown."""
        every = {key for rows in self.rows.values() for row in rows for key in row}
        laws = sorted(key for key in every if key.endswith(PASSED))
        head = [law.removesuffix(PASSED).replace("_", " ") for law in laws]
        lines = [f"| passed, % | {' | '.join(head)} |", "|---" * (1 + len(laws)) + "|"]
        for name, rows in self.rows.items():
            cells = []
            for law in laws:
                applies = [bool(row[law]) for row in rows if law in row]
                cells.append(f"{100 * np.mean(applies):.0f}" if applies else "")
            lines.append(f"| {name} | {' | '.join(cells)} |")
        return "\n".join(lines)


def by_table(recipe: StudyRecipe, rows: Sequence[Row]) -> dict[str, ArmTable]:
    """The tables of a study by name, without those of which no arm is finished."""
    at_end: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["step"] is None:
            at_end[row["arm"]].append(row)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, arm in recipe.arms.items():
        if at_end[name]:
            groups[arm.table].append(name)
    return {group: ArmTable(recipe, names, at_end) for group, names in groups.items()}


def all_tables(recipe: StudyRecipe, rows: Sequence[Row], measured: Sequence[Row]) -> str:
    """The tables of a study's clips, then of what was measured on its models."""
    parts = (tables(recipe, rows) if rows else "", measured_tables(recipe, measured))
    return "\n".join(part for part in parts if part)


def tables_of(recipe: StudyRecipe, path: Path) -> str:
    """The tables of a file that a study wrote: its clips' scores, or what was measured.

    Raises:
        UserError: The file is neither.
    """
    with suppress(UserError):
        return measured_tables(recipe, read_measured(path))
    return tables(recipe, read_rows(path))


def tables(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    """All tables in Markdown: scores, differences from the controls, single laws, and the curve.

    Rows of arms that the recipe does not have, such as renamed ones, are named below them.
    """
    parts = []
    for name, table in by_table(recipe, rows).items():
        parts += [f"### {name.capitalize()}", table.scores(), table.differences(), table.laws()]
    if curve := _curve(recipe, rows):
        parts.append(f"### On the way\n\n{curve}")
    unknown = Counter(row["arm"] for row in rows if row["arm"] not in (BASE, *recipe.arms))
    if unknown:
        named = ", ".join(f"{arm} ({clips})" for arm, clips in unknown.items())
        parts.append(f"Left out, since the recipe has no such arms (rows of each): {named}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _clip(row: Row) -> tuple[str, int]:
    return row["prompt_id"], row["seed"]


def _with(key: str, rows: Sequence[Row]) -> list[Row]:
    return [row for row in rows if key in row]


def _share(rows: Sequence[Row], score: str) -> str:
    of = share(rows, score)
    return f"{of['percent']:.1f} [{of['low']:.0f}, {of['high']:.0f}]"


def _points(d: ArmDifference) -> str:
    interval = f"{d.value:+.1f} [{d.low:+.1f}, {d.high:+.1f}]"
    return interval if np.isnan(d.p_holm) else f"{interval}, p {d.p_holm:.2f}"


def on_the_way(recipe: StudyRecipe, rows: Sequence[Row]) -> dict[str, dict[int, list[Row]]]:
    """The curve's arms and their rows by step, of the same clips at each step. Base is step 0."""
    first = recipe.seeds[0]
    shared = {row["prompt_id"] for row in rows if row["step"] is not None}
    curve: dict[str, dict[int, list[Row]]] = {}
    for arm in recipe.curve.arms if recipe.curve else ():
        end = {BASE: 0, arm: recipe.trained(arm, first).optim.steps}
        at_step: dict[int, list[Row]] = defaultdict(list)
        for row in rows:
            if row["arm"] in end and row["seed"] == first and row["prompt_id"] in shared:
                at_step[end[row["arm"]] if row["step"] is None else row["step"]].append(row)
        if set(at_step) - {0}:
            curve[arm] = dict(sorted(at_step.items()))
    return curve


def _curve(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    lines = ["| arm | step | clips | SA | PC | joint |", "|---|---|---|---|---|---|"]
    for arm, by_step in on_the_way(recipe, rows).items():
        for step, scored in by_step.items():
            shares = (_share(scored, score) for score in SCORES)
            lines.append(f"| {arm} | {step} | {len(scored)} | {' | '.join(shares)} |")
    return "\n".join(lines) if len(lines) > 2 else ""
