"""The recipe of a study: a recipe for all arms, and the changes of each arm."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from videorepa.errors import UserError
from videorepa.lab.study.measures import Measures
from videorepa.recipe import Recipe
from videorepa.settings.bounds import AtOnce, Clips, Number, Seed
from videorepa.settings.section import Section, change, read_values

BASE = "base"
"""The name of the untouched model from which all arms start. No arm can have it."""

SHORT = Path(__file__).parents[1] / "study.yaml"
"""The shipped study: the main arms with few prompts and seeds."""


def _no_single_one(count: int) -> int:
    if count == 1:
        raise ValueError("one clip has no spread: give 2 or more, or 0 for none")
    return count


Prompts = Annotated[int, Field(ge=0, le=1_000_000), AfterValidator(_no_single_one)]


class Arm(Section):
    """One way to fine-tune. The arms of a table are one family of tests.

    Attributes:
        about: Description for the table.
        set: Changes to the study's recipe, each `key=value`.
        table: Name of the arm's table.
        seeds: Number of the study's seeds to train with, from the first. By default all.
        prompts: Number of its prompts to make clips of, from the first. By default all.
        control: The arm to compare this one with, instead of the study's control.
    """

    about: str
    set: tuple[str, ...] = ()
    table: str = "main"
    seeds: AtOnce | None = None
    prompts: Prompts | None = None
    control: str | None = None


class Curve(Section):
    """Scores during a training: at some steps of some arms, with the first seed."""

    steps: tuple[Number, ...] = Field(min_length=1)
    arms: tuple[str, ...] = Field(min_length=1)
    prompts: Clips


class FurtherSeeds(Section):
    """Further seeds for some arms, such as those that a study is mainly about."""

    seeds: tuple[Seed, ...] = Field(min_length=1)
    arms: tuple[str, ...] = Field(min_length=1)


class StudyRecipe(Section):
    """A whole study.

    Attributes:
        recipe: The recipe of every arm, apart from the arm's changes.
        prompts: Number of clips for each arm and seed; 0 makes none. A repeated caption gets other
            noise.
        benchmark: Whose prompts they are, and what scores the clips. "lab" asks for what a caption
            says, and "continuation", of models that continue an image, for what follows the image.
        seeds: Seeds of the trainings. Each also seeds the noise of its clips, which is the same for
            all arms.
        control: The arm to compare the others with.
        again: Arms that all tables but the first repeat, besides base and control.
        measures: What is asked of every model without sampling from it; by default nothing.
        scale: Arms that are the control trained for fewer or more steps, and the control, from the
            shortest on. A difference is also expressed in steps by them.
        known: Pairs of arms of which the second is better for a known reason, such as more clips.
            With those of `scale` they show which measures can be relied on.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    about: str = ""
    recipe: Recipe
    prompts: Prompts
    benchmark: Literal["lab", "continuation"] = "lab"
    seeds: tuple[Seed, ...] = Field(min_length=1)
    control: str = "control"
    again: tuple[str, ...] = ()
    measures: Measures | None = None
    scale: tuple[str, ...] = ()
    known: tuple[tuple[str, str], ...] = ()
    arms: dict[str, Arm]
    more: FurtherSeeds | None = None
    curve: Curve | None = None

    @model_validator(mode="after")
    def _arms_are_there(self) -> StudyRecipe:
        if BASE in self.arms:
            raise ValueError(f"`{BASE}` is the untouched model, and no arm can have its name")
        wanted = [self.control, *self.again]
        wanted += [name for part in (self.more, self.curve) if part for name in part.arms]
        wanted += [*self.scale, *(name for pair in self.known for name in pair)]
        wanted += [arm.control for arm in self.arms.values() if arm.control]
        if missing := [name for name in wanted if name not in self.arms]:
            raise ValueError(f"there is no arm {', '.join(missing)}")
        if len(set(self._every_seed)) < len(self._every_seed):
            raise ValueError(f"the seeds {', '.join(map(str, self._every_seed))} repeat one")
        for name in self.arms:
            self.trained(name, self.seeds[0])  # Raises for an invalid change.
        if not self.prompts and self.measures is None:
            raise ValueError("without `prompts` and `measures` nothing is asked of the arms")
        return self

    @model_validator(mode="after")
    def _scale_rises(self) -> StudyRecipe:
        steps = [self.trained(name, self.seeds[0]).optim.steps for name in self.scale]
        if self.scale and (self.control not in self.scale or steps != sorted(set(steps))):
            listed = ", ".join(f"{name} {n}" for name, n in zip(self.scale, steps, strict=True))
            raise ValueError(
                f"scale lists the control and the same with fewer and more steps, which rise; got "
                f"{listed}, and the control is {self.control}"
            )
        return self

    @model_validator(mode="after")
    def _curve_finds_checkpoints(self) -> StudyRecipe:
        for name in self.curve.arms if self.curve else ():
            recipe = self.trained(name, self.seeds[0])
            last, every = recipe.optim.steps, recipe.train.checkpoint_every
            for step in self.curve.steps if self.curve else ():
                later = last // every - step // every + (step < last and last % every > 0)
                is_saved = step == last or (step < last and step % every == 0)
                if not is_saved or later >= recipe.train.keep_checkpoints:
                    raise ValueError(
                        f"the curve wants step {step}, of which the arm {name} keeps no checkpoint "
                        f"to its end: of {last} steps it saves every {every}th and the last, and "
                        f"keeps the newest {recipe.train.keep_checkpoints}. Change train."
                        "checkpoint_every or train.keep_checkpoints in the study's recipe"
                    )
        return self

    @classmethod
    def from_yaml(cls, path: Path, overrides: Sequence[str] = ()) -> StudyRecipe:
        """Read the recipe of a study.

        With `extends: short` the file has only the differences from the shipped study, and its arms
        come after those of that study. With the name of a file beside it, from that file's.

        Args:
            overrides: Changes such as `prompts=64` or `recipe.optim.steps=9`.

        Raises:
            UserError: The file cannot be read, or a value is wrong.
        """
        values = _extended(path)
        for override in overrides:
            change(values, override)
        return cls.checked(values, f"{path} is not a recipe of a study")

    def trained(self, arm: str, seed: int) -> Recipe:
        """The recipe that an arm trains with a seed."""
        return self.recipe.override(f"name={arm}", f"seed={seed}", *self.arms[arm].set)

    @property
    def _every_seed(self) -> tuple[int, ...]:
        return self.seeds + (self.more.seeds if self.more else ())

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        if self.more and arm in self.more.arms:
            return self._every_seed
        return self.seeds if arm == BASE else self.seeds[: self.arms[arm].seeds]

    def jobs(self) -> list[tuple[str, int]]:
        """Arms and seeds, in the order of their training.

        Tables come one after the other, and within each the first seed of all its arms comes first,
        so that a study that is stopped early has complete comparisons.
        """
        jobs: list[tuple[str, int]] = []
        for table in dict.fromkeys(arm.table for arm in self.arms.values()):
            names = [name for name, arm in self.arms.items() if arm.table == table]
            arms = names if jobs else [BASE, *names]
            every = self._every_seed
            jobs += [(arm, seed) for seed in every for arm in arms if seed in self.seeds_of(arm)]
        return jobs

    def asked(self) -> set[tuple[str, int]]:
        """The arms and seeds whose models are measured. Base is the same with every seed."""
        if self.measures is None:
            return set()
        return {(arm, seed) for arm, seed in self.jobs() if arm != BASE or seed == self.seeds[0]}

    def control_of(self, arm: str) -> str:
        return self.arms[arm].control or self.control

    def prompts_of(self, arm: str) -> int:
        fewer = None if arm == BASE else self.arms[arm].prompts
        return self.prompts if fewer is None else min(fewer, self.prompts)

    def parts_of(self, arm: str, seed: int) -> list[tuple[int | None, int]]:
        """The steps at which an arm makes clips, None for its end, and the number of prompts."""
        count = self.prompts_of(arm)
        parts: list[tuple[int | None, int]] = [(None, count)] if count else []
        if self.curve and arm in self.curve.arms and seed == self.seeds[0]:
            count = min(self.curve.prompts, self.prompts)
            parts += [(step, count) for step in self.curve.steps]
        return parts


def _extended(path: Path) -> dict[str, Any]:
    """The values of a study's file, on top of those of the file that it extends."""
    values = read_values(path)
    name = values.pop("extends", None)
    if name is None:
        return values
    if name != "short" and (not isinstance(name, str) or Path(name).name != name):
        raise UserError(
            f"{path}: extends can be `short` or the name of a file beside it; got {name!r}."
        )
    base = SHORT if name == "short" else path.with_name(name)
    if base == path:
        raise UserError(f"{path}: extends names the file itself.")
    extended = read_values(base)
    if "extends" in extended:
        raise UserError(f"{path}: extends names {name}, which extends another study itself.")
    arms = values.get("arms") or {}
    if isinstance(arms, dict) and isinstance(extended.get("arms"), dict):
        values["arms"] = extended["arms"] | arms
    return extended | values
