"""What was measured on a study's models, and the tables in which trainings are the unit.

Trainings that differ in their seed alone differ more than most arms do. So an arm is compared with
its control seed by seed, and an interval is about other seeds.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from videorepa.errors import UserError
from videorepa.evaluation.statistics import MeanOfFew, holm, mean_of_few
from videorepa.lab.study.measures import ALL, LIKELIER, LOG_RATIO, LOSS
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.lab.study.rows import CHECKS_PASSED, VIOLATION, Row
from videorepa.system.files import check_is_file, csv_text

COLUMNS = ("arm", "seed", "measure", "part", "value", "n")

ASKED = (LOSS, LIKELIER, LOG_RATIO)
"""The measures that need no clips of the model's own."""

SIGN = {LOSS: -1, LIKELIER: 1, LOG_RATIO: 1, "sa": 1, "pc": 1, CHECKS_PASSED: 1, VIOLATION: -1}
"""The measures, each 1 where more is better and -1 where less is."""

IN_PERCENT = (LIKELIER, "sa", "pc", CHECKS_PASSED)

OF_CLIPS = tuple(measure for measure in SIGN if measure not in ASKED)
"""The measures that are means over generated clips."""


def measured_text(rows: Sequence[Row]) -> str:
    """Rows as CSV, with six digits."""
    return csv_text(COLUMNS, [row | {"value": f"{row['value']:.6g}"} for row in rows])


def read_measured(path: Path) -> list[Row]:
    """Read what `measured_text` wrote.

    Raises:
        UserError: The file cannot be read or was not written by a study.
    """
    kinds = {"seed": int, "value": float, "n": int}
    try:
        check_is_file(path)
        with path.open(encoding="utf-8", newline="") as file:
            rows = [
                {key: kinds.get(key, str)(row[key]) for key in COLUMNS}
                for row in csv.DictReader(file, strict=True)
            ]
    except (OSError, ValueError, KeyError, csv.Error, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"{path} is not what a study measured: {reason}") from None
    if not rows:
        raise UserError(f"{path} is not what a study measured: it is empty")
    return rows


@dataclass(frozen=True)
class Gain:
    """How much better an arm is than its control in one measure, seed by seed.

    Attributes:
        of: The mean over seeds; above 0 is better, whichever way the measure goes.
        by_seed: The gain of each seed.
        steps: How many more steps of the control's training are worth as much, and as much as the
            ends of the interval: infinite beyond the study's scale, NaN without one or over
            another control than the study's.
        p_holm: The p-value adjusted for the arms of the table.
    """

    of: MeanOfFew
    by_seed: tuple[float, ...]
    steps: tuple[float, float, float]
    p_holm: float = float("nan")


class Measured:
    """What a study measured.

    Args:
        recipe: The study.
        rows: The rows of `Meter.measure`, with arm and seed.
    """

    def __init__(self, recipe: StudyRecipe, rows: Sequence[Row]) -> None:
        self.recipe = recipe
        self.values: dict[tuple[str, str, str], dict[int, float]] = defaultdict(dict)
        for row in rows:
            self.values[row["arm"], row["measure"], row["part"]][row["seed"]] = row["value"]
        self.parts = {
            measure: list(dict.fromkeys(r["part"] for r in rows if r["measure"] == measure))
            for measure in SIGN
        }

    def of(self, arm: str, measure: str, part: str = ALL) -> dict[int, float]:
        """The values of an arm by seed; empty if it was not measured."""
        return self.values.get((arm, measure, part), {})

    def groups(self) -> dict[str, list[str]]:
        """The arms whose loss was measured, by their table."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, arm in self.recipe.arms.items():
            if self.of(name, LOSS):
                groups[arm.table].append(name)
        return groups

    def gain(self, arm: str, control: str, measure: str, part: str = ALL) -> Gain | None:
        """An arm's gain over another with the same seeds; None if they share none."""
        ours, theirs = self.of(arm, measure, part), self.of(control, measure, part)
        seeds = sorted(ours.keys() & theirs.keys())
        if not seeds:
            return None
        by_seed = tuple(SIGN[measure] * (ours[seed] - theirs[seed]) for seed in seeds)
        of = mean_of_few(by_seed)
        if control != self.recipe.control:  # The scale is of the study's control alone.
            return Gain(of, by_seed, (math.nan, math.nan, math.nan))
        value, low, high = (self._more_steps(x, measure, part) for x in (of.value, of.low, of.high))
        return Gain(of, by_seed, (value, low, high))

    def _more_steps(self, gain: float, measure: str, part: str) -> float:
        """How many more steps of the control's training are worth a gain.

        It is read off the mean gains of the scale's arms over the control, linearly in the
        logarithm of steps. It is infinite beyond the scale's ends, and NaN where there is none or
        more steps are not better throughout.
        """
        first = self.recipe.seeds[0]
        steps, gains = [], []
        for arm in self.recipe.scale:
            ours = self.of(arm, measure, part)
            theirs = self.of(self.recipe.control, measure, part)
            both = ours.keys() & theirs.keys()
            if not both:
                continue
            steps.append(self.recipe.trained(arm, first).optim.steps)
            gains.append(SIGN[measure] * float(np.mean([ours[s] - theirs[s] for s in both])))
        if len(steps) < 2 or any(np.diff(gains) <= 0):
            return math.nan
        worth = float(np.interp(gain, gains, np.log(steps), left=-math.inf, right=math.inf))
        if math.isinf(worth):
            return worth
        return math.exp(worth) - self.recipe.trained(self.recipe.control, first).optim.steps

    def gains(self, names: Sequence[str], measure: str, part: str = ALL) -> dict[str, Gain]:
        """The gains of arms over their controls, with p-values adjusted for one another.

        A single seed tests nothing, so it is none of the family and has no p-value.
        """
        found = {}
        for name in names:
            gain = self.gain(name, self.recipe.control_of(name), measure, part)
            if gain is not None and name != self.recipe.control_of(name):
                found[name] = gain
        tested = {name: gain for name, gain in found.items() if len(gain.by_seed) > 1}
        adjusted = holm([gain.of.p for gain in tested.values()])
        for (name, gain), p in zip(tested.items(), adjusted, strict=True):
            found[name] = replace(gain, p_holm=p)
        return found

    def table(self, names: Sequence[str], measures: Sequence[str] = ASKED) -> str:
        """Arms beside base and control in some measures, in Markdown."""
        measures = [measure for measure in measures if self.parts[measure]]
        gains = {measure: self.gains(names, measure) for measure in measures}
        arms = dict.fromkeys((BASE, self.recipe.control, *names))
        return in_markdown(
            [
                self.cells(name, {measure: of.get(name) for measure, of in gains.items()})
                for name in arms
                if any(self.of(name, measure) for measure in measures)
            ]
        )

    def cells(self, name: str, gains: Mapping[str, Gain | None]) -> dict[str, str]:
        """An arm's line of a table: its means over seeds and its gains, by measure."""
        arm = self.recipe.arms.get(name)
        cells = {"arm": name, "what it is": arm.about if arm else "the untouched model"}
        cells["seeds"] = str(max(len(self.of(name, measure)) for measure in gains))
        for measure, gain in gains.items():
            if not self.of(name, measure):
                continue
            cells[measure] = _number(measure, float(np.mean([*self.of(name, measure).values()])))
            cells[f"{measure}: gain"] = self.cell(gain, measure)
        return cells

    def cell(self, gain: Gain | None, measure: str) -> str:
        """A gain in words: its mean, interval and adjusted p-value, and its worth in steps."""
        if gain is None:
            return ""
        of = gain.of
        has_scale = not math.isnan(gain.steps[0])
        if len(gain.by_seed) == 1:
            worth = f", steps {_more(gain.steps[0])}" if has_scale else ""
            return f"{change_text(measure, of.value)}, one seed{worth}"
        if math.isinf(of.low):
            return f"{change_text(measure, of.value)}, the same in each seed"
        interval = f"[{change_text(measure, of.low)}, {change_text(measure, of.high)}]"
        cell = f"{change_text(measure, of.value)} {interval}, p {gain.p_holm:.2g}"
        if not has_scale:
            return cell
        value, low, high = map(_more, gain.steps)
        return f"{cell}, steps {value} [{low}, {high}]"

    def by_part(self, names: Sequence[str], measure: str) -> str:
        """The gains of arms by noise level or by law, in Markdown.

        Those whose interval over seeds leaves out 0 are bold. They are not adjusted for how many
        there are.
        """
        parts = [part for part in self.parts[measure] if part != ALL]
        rows = []
        for name in names:
            cells = {"arm": name}
            for part in parts:
                gain = self.gain(name, self.recipe.control_of(name), measure, part)
                if gain is None or name == self.recipe.control_of(name):
                    break
                text = change_text(measure, gain.of.value)
                cells[part] = f"**{text}**" if gain.of.low > 0 or gain.of.high < 0 else text
            else:
                rows.append(cells)
        return in_markdown(rows) if parts else ""

    def calibration(self) -> str:
        """Whether each measure orders the arms of which it is known which is better, in Markdown.

        For each pair of arms it has the share of seeds with the right order, and the mean gain over
        the spread of gains between seeds; then the spread between the control's trainings, and the
        smallest gain that so many seeds would show.
        """
        pairs = [*zip(self.recipe.scale, self.recipe.scale[1:], strict=False), *self.recipe.known]
        control = self.recipe.control
        rows = []
        for measure in SIGN:
            for part in (ALL, *(part for part in self.parts[measure] if part != ALL)):
                cells = {"measure": f"{measure}, {part}"}
                for worse, better in pairs:
                    gain = self.gain(better, worse, measure, part)
                    if gain is None:
                        continue
                    right = sum(value > 0 for value in gain.by_seed)
                    cells[f"{worse} < {better}"] = (
                        f"{right}/{len(gain.by_seed)}, {change_text(measure, gain.of.value)}"
                    )
                if len(cells) == 1:
                    continue
                values = [*self.of(control, measure, part).values()]
                spread = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
                cells["control's spread"] = _number(measure, spread)
                rows.append(cells)
        return in_markdown(rows)


def _number(measure: str, value: float) -> str:
    return f"{value:.2f}" if measure in IN_PERCENT else f"{value:.5f}"


def change_text(measure: str, gain: float) -> str:
    """A gain in words: of the loss in units of 1e-5, of the rest in its own."""
    if measure == LOSS:
        return f"{gain * 1e5:+z.0f}e-5"
    return f"{gain:+z.2f}" if measure in IN_PERCENT else f"{gain:+z.4f}"


def _more(steps: float) -> str:
    if math.isfinite(steps):
        return f"{steps:+.0f}"
    return "more than the scale has" if steps > 0 else "fewer than the scale has"


def in_markdown(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows as a table in Markdown; a cell that a row lacks is empty."""
    if not rows:
        return ""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns), *([r.get(c, "") for c in columns] for r in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def measured_tables(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    """All tables of what was measured, in Markdown; "" without rows."""
    if not rows:
        return ""
    measured = Measured(recipe, rows)
    parts = []
    for group, names in measured.groups().items():
        parts += [f"### {group.capitalize()}, measured without sampling", measured.table(names)]
        if table := measured.table(names, OF_CLIPS):
            parts += ["Means over generated clips, with trainings as the unit:", table]
        for measure, kind in ((LOSS, "noise level"), (LOG_RATIO, "law")):
            if table := measured.by_part(names, measure):
                parts += [f"Gains in {measure} by {kind}:", table]
    if table := measured.calibration():
        parts += ["### What each measure can tell", table]
    return "\n\n".join(part for part in parts if part) + "\n"
