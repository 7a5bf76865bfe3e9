"""Compares a training's curves with those of runs that differ only in the seed.

A reference holds, for each quantity, the band in which a further run of the same recipe is expected
at a step. With n runs and n seeds it is mean ± t · sd · sqrt(1 + 1/n), with Student's t for n - 1
degrees of freedom: the 99 % prediction interval of one new run. The range of so few runs would be
too narrow, since a new run leaves the range of n others at 2 of n + 1 steps. Mean ± 3 sd would be
too narrow as well, since so few runs give only an estimate of the deviation; t allows for that.

Quantities that are positive throughout, such as losses and norms, are taken in logarithms. Chance
multiplies them, and a band that reaches below zero would not notice a fall. Single steps are mostly
noise, so the quantity that is compared at a point is its mean over the tenth of the training's
steps that ends there. Such a mean is available while a run still goes on.

A normal run is outside of such a band at 1 % of the points, so a single point means nothing. A
quantity counts as outside if it is outside at more than one point and at more than a tenth of them.
That happens to a normal run with a probability of at most 10 % (Markov's inequality), and far less
if the points err independently.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from videorepa.artifacts.run import FREE_TO_CHANGE, Run, differences
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.section import Section
from videorepa.system.files import atomic_write, parse_json, read_text
from videorepa.system.fingerprint import json_digest

SHIPPED = Path(__file__).parent / "micro" / "reference"

QUANTITIES = ("denoise", "align", "similarity", "grad_norm")

CONFIDENCE = 0.99

POINTS = 20
"""Points of a whole training at which it is compared."""

WINDOW_SHARE = 0.1
"""Share of a training's steps over which a point is the mean."""

FORGIVEN = 0.1
"""Share of the points that may be outside. A single one always may."""

FEWEST = 3
"""Smallest number of runs for a reference. With two, t is 64 and the band holds everything."""

FREE = (
    *FREE_TO_CHANGE,
    "name",
    "seed",
    "data.manifest",
    "data.root",
    "data.cache",
    "data.prepare_batch",
)
"""Runs that differ only in these settings have the same curves except for chance, provided that the
paths lead to the same clips."""

FREE_SECTIONS = ("generation", "validation")


class Band(Section):
    """Where a quantity is expected. Every list has one value per step.

    Attributes:
        mean: The geometric mean if the quantity is taken in logarithms.
    """

    steps: list[int]
    mean: list[float]
    low: list[float]
    high: list[float]


class Reference(Section):
    """The bands of all quantities, and the runs that they were made from.

    Attributes:
        recipe: The runs' recipe, without the folders in its paths.
        models: Digests of the weights that the runs started from.
        environment: Versions and machine of the first run.
    """

    recipe: Recipe
    models: dict[str, str]
    seeds: list[int]
    environment: dict[str, Any]
    bands: dict[str, Band]

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read a reference. Raises UserError if it is missing or damaged."""
        try:
            return cls.model_validate(parse_json(read_text(path)))
        except FileNotFoundError:
            raise UserError(f"There is no reference {path}.") from None
        except ValueError as error:  # In the JSON or in its content.
            raise UserError(
                f"{path} is not a reference ({str(error).splitlines()[0]}). `videorepa compare "
                f"RUN RUN RUN --make {path}` writes one."
            ) from None


@dataclass(frozen=True)
class CurveVerdict:
    """How one quantity compares with its band.

    Attributes:
        points: Number of points at which it was compared.
        outside: Steps of the points at which it was outside.
    """

    quantity: str
    points: int
    outside: list[int]

    @property
    def inside(self) -> float:
        """Share of the points in the band."""
        return 1 - len(self.outside) / self.points

    @property
    def is_normal(self) -> bool:
        return len(self.outside) <= max(1, FORGIVEN * self.points)


@dataclass(frozen=True)
class CurveComparison:
    """A run's curves against a reference.

    Attributes:
        name: Name of the reference.
        differing: Settings in which the recipes differ, if the user chose the reference.
        step: The last step that was compared.
    """

    run: Path
    name: str
    reference: Reference
    differing: list[str]
    step: int
    verdicts: list[CurveVerdict]

    @property
    def is_normal(self) -> bool:
        return all(verdict.is_normal for verdict in self.verdicts)

    @property
    def sentence(self) -> str:
        """The result in words."""
        outside = [verdict for verdict in self.verdicts if not verdict.is_normal]
        against = f"{len(self.reference.seeds)} runs of {self.name}, up to step {self.step}"
        if self.differing:
            against += f" (their recipe differs in {', '.join(self.differing)})"
        if not outside:
            return f"{self.run} is like {against}."
        where = ", ".join(f"{v.quantity} first at step {v.outside[0]}" for v in outside)
        return f"{self.run} is not like {against}: {where}."

    def __str__(self) -> str:
        width = max(len(verdict.quantity) for verdict in self.verdicts)
        lines = [f"{'quantity':{width}}  inside  first outside  verdict"]
        for verdict in self.verdicts:
            first = f"step {verdict.outside[0]}" if verdict.outside else "-"
            word = "normal" if verdict.is_normal else "outside"
            inside = f"{verdict.inside:.0%}"
            lines.append(f"{verdict.quantity:{width}}  {inside:>6}  {first:>13}  {word}")
        return "\n".join(lines)


def compare(run: Path, reference: Path | None = None) -> CurveComparison:
    """Say whether a run's losses, similarities and gradient norms are where they should be.

    An unfinished run is compared up to its last step.

    Args:
        run: The run's folder.
        reference: A file that `make_reference` wrote, of any recipe; by default the shipped one
            that has the run's recipe.

    Raises:
        UserError: No shipped reference has the run's recipe, or the log is damaged or too short.
    """
    opened = Run.open(run)
    step = opened.last_step
    path = reference or _shipped(opened.recipe)
    bands = Reference.read(path)
    last = min(step, bands.recipe.optim.steps)
    verdicts = []
    for quantity, band in bands.bands.items():
        steps = [step for step in band.steps if step <= last]
        if not steps:
            continue
        values = _smoothed(opened, quantity, steps, bands.recipe.optim.steps)
        low, high = np.array(band.low[: len(steps)]), np.array(band.high[: len(steps)])
        inside = (low <= values) & (values <= high)  # A value that was not logged is outside.
        outside = [step for step, fits in zip(steps, inside, strict=True) if not fits]
        verdicts.append(CurveVerdict(quantity, len(steps), outside))
    if not verdicts:
        first = min(band.steps[0] for band in bands.bands.values())
        raise UserError(
            f"{run} has logged {last} steps; {path.stem} begins at step {first}. Wait until then."
        )
    differing = _differing(opened.recipe, bands.recipe)
    return CurveComparison(run, path.stem, bands, differing, last, verdicts)


def make_reference(runs: Sequence[Path], out: Path) -> Reference:
    """Make a reference from finished runs of one recipe and write it as JSON.

    Args:
        runs: Folders of three runs or more, each with a seed of its own.
        out: The file to write.

    Raises:
        UserError: There are fewer runs, they differ in more than the seed, or one is not finished.
    """
    if len(runs) < FEWEST:
        raise UserError(
            f"A reference is made from {FEWEST} runs or more, which differ in the seed; got "
            f"{len(runs)}. `videorepa train RECIPE --set seed=1 --out DIR` makes another."
        )
    opened = [Run.open(run) for run in runs]
    recipes = [run.recipe for run in opened]
    recipe, steps = recipes[0], recipes[0].optim.steps
    for run, other in zip(opened, recipes, strict=True):
        if differing := _differing(other, recipe):
            raise UserError(
                f"{run.path} has another recipe than {runs[0]}; they differ in "
                f"{', '.join(differing)}."
            )
        if run.last_step < steps:
            raise UserError(
                f"{run.path} is at step {run.last_step} of {steps}. Train it to its end first."
            )
    seeds = [other.seed for other in recipes]
    if len(set(seeds)) < len(seeds):
        raise UserError(f"The runs have the seeds {seeds}; each needs a seed of its own.")
    reference = Reference(
        recipe=_without_paths(recipe),
        models=_models(recipe),
        seeds=seeds,
        environment=opened[0].environment,
        bands={
            quantity: _band(opened, quantity, steps)
            for quantity in opened[0].log[0]
            if quantity.partition(".")[0] in QUANTITIES
        },
    )
    atomic_write(out, json.dumps(reference.model_dump(mode="json")) + "\n")
    return reference


def _band(runs: Sequence[Run], quantity: str, length: int) -> Band:
    points = np.unique(np.linspace(0, length, POINTS + 1).round().astype(int)[1:])
    values = np.array([_smoothed(run, quantity, points, length) for run in runs])
    logged = np.isfinite(values).all(0)  # A term can stop early.
    values, count = values[:, logged], len(runs)
    is_positive = bool((values > 0).all())
    values = np.log(values) if is_positive else values
    mean, sd = values.mean(0), values.std(0, ddof=1)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, count - 1) * sd * np.sqrt(1 + 1 / count)
    bounds = np.stack([mean, mean - reach, mean + reach])
    bounds = np.exp(bounds) if is_positive else bounds
    return Band(
        steps=points[logged].tolist(),
        **{
            name: [float(f"{value:.5g}") for value in each]
            for name, each in zip(("mean", "low", "high"), bounds, strict=True)
        },
    )


def _smoothed(
    run: Run, quantity: str, points: Sequence[int] | np.ndarray, length: int
) -> np.ndarray:
    """The quantity's mean over the steps up to each point; NaN where it was not logged."""
    window = max(1, round(WINDOW_SHARE * length))
    logged = {row["step"]: row[quantity] for row in run.log if row.get(quantity) is not None}
    spans = [
        [logged[step] for step in range(point - window + 1, point + 1) if step in logged]
        for point in points
    ]
    return np.array([np.mean(span) if span else np.nan for span in spans])


def _differing(ours: Recipe, theirs: Recipe) -> list[str]:
    """The settings that differ and matter to the curves."""
    keys = differences(ours.model_dump(mode="json"), theirs.model_dump(mode="json"))
    return [key for key in keys if key not in FREE and key.partition(".")[0] not in FREE_SECTIONS]


def _models(recipe: Recipe) -> dict[str, str]:
    teachers = {e.name: json_digest(e.fingerprint()) for e in recipe.stored_encoders}
    return recipe.backbone.identity() | teachers


def _shipped(recipe: Recipe) -> Path:
    missed = []
    for path in sorted(SHIPPED.glob("*.json")):
        reference = Reference.read(path)
        differing = _differing(recipe, reference.recipe)
        if not differing:
            # A model that was trained anew under its old name has other curves.
            differing = differences(_models(recipe), reference.models, "models")
        if not differing:
            return path
        missed.append(f"  {path.stem}: differs in {', '.join(differing)}")
    raise UserError(
        f"There is no reference for the recipe of {recipe.name}. Those that are shipped:\n"
        + "\n".join(missed)
        + "\nGive a file with --reference, or make one: `videorepa compare RUN RUN RUN --make "
        "FILE`, from runs that differ in the seed."
    )


def _without_paths(recipe: Recipe) -> Recipe:
    """The recipe without the folders of the machine that it ran on."""
    paths = {key: getattr(recipe.data, key) for key in ("cache", "manifest", "root")}
    return recipe.override(*(f"data.{key}={path.name}" for key, path in paths.items() if path))
