"""The recipe of a study: what every arm trains, and what each changes of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import Field, ValidationError, model_validator

from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.section import Section, change, read_values

BASE = "base"
"""The model that all arms start from, untouched: no arm can be called so."""

SHORT = Path(__file__).parents[1] / "study.yaml"
"""The shipped study: the main arms, with few prompts and seeds."""


class Arm(Section):
    """One way to fine-tune. Arms of one table are one family of tests.

    about: what it is, in the table's words. set: what it changes of the study's recipe, as
        `key=value`. seeds, prompts: how many of the study's seeds it is trained with, and of its
        prompts it makes clips of, from the first; by default all.
    """

    about: str
    set: tuple[str, ...] = ()
    table: str = "main"
    seeds: int | None = Field(default=None, ge=1)
    prompts: int | None = Field(default=None, ge=2)
    control: str | None = None


class Curve(Section):
    """Scores on the way: at these steps, of these arms, with the first seed and some prompts."""

    steps: tuple[int, ...] = Field(min_length=1)
    arms: tuple[str, ...] = Field(min_length=1)
    prompts: int = Field(ge=1)


class More(Section):
    """Further seeds of some arms: what a study is chiefly about can be asked of more trainings."""

    seeds: tuple[int, ...] = Field(min_length=1)
    arms: tuple[str, ...] = Field(min_length=1)


class StudyRecipe(Section):
    """A whole study.

    recipe: what every arm trains, but for what the arm changes. prompts: clips of each arm and
        seed; a caption that comes again gets noise of its own. seeds: of the trainings; each has
        noise of its own for its clips too, and all arms have the same. control: the arm that the
        others are compared with. again: arms that every table after the first one shows again,
        beside base and control.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    about: str = ""
    recipe: Recipe
    prompts: int = Field(ge=2)
    seeds: tuple[int, ...] = Field(min_length=1)
    control: str = "control"
    again: tuple[str, ...] = ()
    arms: dict[str, Arm]
    more: More | None = None
    curve: Curve | None = None

    @model_validator(mode="after")
    def _arms_are_there(self) -> StudyRecipe:
        if BASE in self.arms:
            raise ValueError(f"`{BASE}` is the untouched model, and no arm can be called so")
        wanted = [self.control, *self.again]
        wanted += [name for part in (self.more, self.curve) if part for name in part.arms]
        wanted += [arm.control for arm in self.arms.values() if arm.control]
        if missing := [name for name in wanted if name not in self.arms]:
            raise ValueError(f"there is no arm {', '.join(missing)}")
        if len(set(self._every_seed)) < len(self._every_seed):
            raise ValueError(f"the seeds {', '.join(map(str, self._every_seed))} repeat one")
        for name in self.arms:
            self.trained(name, self.seeds[0])  # Raises for a change that is none.
        return self

    @classmethod
    def from_yaml(cls, path: Path, overrides: Sequence[str] = ()) -> StudyRecipe:
        """Read it. Overrides are of the study's own keys, `prompts=64` or `recipe.optim.steps=9`.

        With `extends: short` it says only what differs from the shipped study, and its arms come
        after that one's. Raises UserError that names what is wrong.
        """
        values = read_values(path)
        extended = values.pop("extends", None)
        if extended is not None:
            if extended != "short":
                raise UserError(f"{path}: extends can only be `short`; got {extended!r}.")
            short = read_values(SHORT)
            arms = values.get("arms") or {}
            values = short | values
            if isinstance(arms, dict):
                values["arms"] = short["arms"] | arms
        for override in overrides:
            change(values, override)
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            said = error.errors()[0]
            where = ".".join(map(str, said["loc"]))
            raise UserError(f"{path} is not a recipe of a study: {where}: {said['msg']}") from None

    def trained(self, arm: str, seed: int) -> Recipe:
        """What an arm trains with a seed."""
        return self.recipe.override(f"name={arm}", f"seed={seed}", *self.arms[arm].set)

    @property
    def _every_seed(self) -> tuple[int, ...]:
        return self.seeds + (self.more.seeds if self.more else ())

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        if self.more and arm in self.more.arms:
            return self._every_seed
        return self.seeds if arm == BASE else self.seeds[: self.arms[arm].seeds]

    def jobs(self) -> list[tuple[str, int]]:
        """Arms and seeds in the order in which they are done: table by table, and in each the first
        seed of all arms first, so that a study that is stopped early has whole comparisons."""
        jobs: list[tuple[str, int]] = []
        for table in dict.fromkeys(arm.table for arm in self.arms.values()):
            names = [name for name, arm in self.arms.items() if arm.table == table]
            asked = [BASE, *names] if not jobs else names
            every = self._every_seed
            jobs += [(a, seed) for seed in every for a in asked if seed in self.seeds_of(a)]
        return jobs

    def control_of(self, arm: str) -> str:
        return self.arms[arm].control or self.control

    def prompts_of(self, arm: str) -> int:
        fewer = None if arm == BASE else self.arms[arm].prompts
        return self.prompts if fewer is None else min(fewer, self.prompts)

    def parts_of(self, arm: str, seed: int) -> list[tuple[int | None, int]]:
        """The steps at which it makes clips, None for its end, and of how many prompts."""
        parts: list[tuple[int | None, int]] = [(None, self.prompts_of(arm))]
        if self.curve and arm in self.curve.arms and seed == self.seeds[0]:
            count = min(self.curve.prompts, self.prompts)
            parts += [(step, count) for step in self.curve.steps]
        return parts
