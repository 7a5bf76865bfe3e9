"""The lab's question, answered with error bars: the same base model, clips and steps, and only the
alignment differs."""

from __future__ import annotations

import csv
import json
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from videorepa import plugins
from videorepa.data.files import atomic_write, csv_text, is_vacant
from videorepa.data.manifest import Prompt
from videorepa.device import keep_freed_memory
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.generate import generate
from videorepa.lab.laws import CHECKS
from videorepa.prepare import prepare
from videorepa.progress import console
from videorepa.recipe import Recipe, Section, change, read_values
from videorepa.run import Run
from videorepa.statistics import holm, paired_bootstrap, sign_flip, wilson
from videorepa.train import train

BASE = "base"
"""The model that all arms start from, untouched: no arm can be called so."""
SCORES = ("sa", "pc", "joint")
CHECKS_PASSED = "checks"
"""Share of PC's checks that a clip passes, of those that apply to it: 0 to 1."""
MEASURED = (CHECKS_PASSED, "motion")
ROWS = "rows.csv"
SHORT = Path(__file__).with_name("study.yaml")
"""The shipped study: the main arms, with few prompts and seeds."""

Row = dict[str, Any]


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


class Curve(Section):
    """Scores on the way: at these steps, of these arms, with the first seed and some prompts."""

    steps: tuple[int, ...] = Field(min_length=1)
    arms: tuple[str, ...] = Field(min_length=1)
    prompts: int = Field(ge=1)


class StudyRecipe(Section):
    """A whole study.

    recipe: what every arm trains, but for what the arm changes. prompts: clips of each arm and
        seed; a caption that comes again gets noise of its own. seeds: of the trainings; each has
        noise of its own for its clips too, and all arms have the same. control: the arm that the
        others are compared with.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    about: str = ""
    recipe: Recipe
    prompts: int = Field(ge=2)
    seeds: tuple[int, ...] = Field(min_length=1)
    control: str = "control"
    arms: dict[str, Arm]
    curve: Curve | None = None

    @model_validator(mode="after")
    def _arms_are_there(self) -> StudyRecipe:
        if BASE in self.arms:
            raise ValueError(f"`{BASE}` is the untouched model, and no arm can be called so")
        wanted = (self.control, *(self.curve.arms if self.curve else ()))
        if missing := [name for name in wanted if name not in self.arms]:
            raise ValueError(f"there is no arm {', '.join(missing)}")
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

    def seeds_of(self, arm: str) -> tuple[int, ...]:
        return self.seeds if arm == BASE else self.seeds[: self.arms[arm].seeds]

    def jobs(self) -> list[tuple[str, int]]:
        """Arms and seeds in the order in which they are done: table by table, and in each the first
        seed of all arms first, so that a study that is stopped early has whole comparisons."""
        jobs: list[tuple[str, int]] = []
        for table in dict.fromkeys(arm.table for arm in self.arms.values()):
            names = [name for name, arm in self.arms.items() if arm.table == table]
            asked = [BASE, *names] if not jobs else names
            jobs += [(a, seed) for seed in self.seeds for a in asked if seed in self.seeds_of(a)]
        return jobs

    def prompts_of(self, arm: str) -> int:
        fewer = None if arm == BASE else self.arms[arm].prompts
        return self.prompts if fewer is None else min(fewer, self.prompts)

    def parts_of(self, arm: str, seed: int) -> list[tuple[int | None, int]]:
        """The steps at which it makes clips, None for its end, and of how many prompts."""
        parts: list[tuple[int | None, int]] = [(None, self.prompts_of(arm))]
        if self.curve and arm in self.curve.arms and seed == self.seeds[0]:
            parts += [(step, self.curve.prompts) for step in self.curve.steps]
        return parts


@dataclass(frozen=True)
class Study:
    """What a study found. rows: the scores of every clip, which all else follows from.
    missing: arms and seeds that are still to be done."""

    recipe: StudyRecipe
    out: Path
    rows: list[Row]
    missing: list[str]

    @cached_property
    def tables(self) -> str:
        """In Markdown; worked out once, since every interval is ten thousand draws."""
        return tables(self.recipe, self.rows)


def study(recipe: StudyRecipe, out: Path, *, shard: tuple[int, int] = (0, 1)) -> Study:
    """Train, generate and score every arm with every seed; what is done already is kept.

    shard: (i, n) does every n-th of them from the i-th; any process that finds all done writes
    the tables. `out` gets rows.csv, a row for every clip, and tables.md. Raises UserError if it
    holds something else, or runs or clips that were made otherwise.
    """
    index, count = shard
    _take(recipe, out)
    keep_freed_memory()
    arms = list(recipe.arms)
    jobs = recipe.jobs()
    mine = jobs[index::count]
    recipes = {arm: _placed(recipe.trained(arm, recipe.seeds[0]), out) for arm in arms}
    for part in ((index, count), (0, 1)):  # Then what the other processes have not done.
        for arm in arms:
            prepare(recipes[arm], shard=part)
    for arm, seed in _announced(recipe, out, mine):
        _do(recipe, out, arm, seed)
    rows = list(_rows(recipe, out, jobs))
    if rows:  # A process can have nothing to do while no other has finished anything.
        atomic_write(out / ROWS, rows_text(rows))
        rows = read_rows(out / ROWS)  # So that tables are what the file's would be.
    missing = [f"{a}, seed {s}" for a, s in jobs if _clips_left(recipe, out, a, s)]
    found = Study(recipe, out, rows, missing)
    if not found.missing:
        atomic_write(out / "tables.md", found.tables)
    return found


def _take(recipe: StudyRecipe, out: Path) -> None:
    """Make the folder the study's. What is in it may be of another recipe: each verb refuses what
    does not fit, so that arms and prompts can be added to a study."""
    path = out / "study.yaml"
    if not path.exists() and not is_vacant(out):
        raise UserError(f"{out} exists and is not a study. Choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _placed(recipe: Recipe, out: Path) -> Recipe:
    return recipe.override(f"data.cache={out / 'cache'}")


def _prompts(count: int) -> list[Prompt]:
    drawn = plugins.benchmark("lab").prompts(count, seed=0)
    return [Prompt(prompt.id, prompt.caption) for prompt in drawn]


def _do(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> None:
    prompts = _prompts(recipe.prompts)
    if arm == BASE:
        model = out / f"{BASE}.yaml"
        _placed(recipe.recipe, out).to_yaml(model)
    else:
        model = train(_placed(recipe.trained(arm, seed), out), out / "runs" / f"{arm}-{seed}").path
    for step, count in recipe.parts_of(arm, seed):
        clips = _clips(out, arm, seed, step)
        begun, more = time.monotonic(), _scored(clips) < count
        generate(model, prompts[:count], clips, seed=seed, step=step)
        evaluate("lab", clips)
        if more:
            seconds = _seconds(clips) + time.monotonic() - begun
            atomic_write(clips / "scores" / "seconds.json", json.dumps(seconds))


def _announced(
    recipe: StudyRecipe, out: Path, jobs: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    """Each job, said aloud with the time left, by what the steps and clips so far took."""
    todo = [_steps_left(recipe, out, *job) + _clips_left(recipe, out, *job) for job in jobs]
    begun, done = time.monotonic(), 0
    for number, (arm, seed) in enumerate(jobs):
        left = ""
        if done:
            minutes = (time.monotonic() - begun) / done * sum(todo[number:]) / 60
            left = f", about {minutes:.0f} min left"
        console.print(f"{number + 1}/{len(jobs)}  {arm}, seed {seed}{left}", style="bold")
        yield arm, seed
        done += todo[number]


def _steps_left(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> int:
    if arm == BASE:
        return 0
    run = out / "runs" / f"{arm}-{seed}"
    newest = Run.open(run).newest() if Run.is_one(run) else None
    return recipe.trained(arm, seed).optim.steps - (newest.step if newest else 0)


def _clips_left(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> int:
    """How many are still to be scored."""
    parts = recipe.parts_of(arm, seed)
    return sum(max(0, count - _scored(_clips(out, arm, seed, step))) for step, count in parts)


def _scored(clips: Path) -> int:
    """How many clips have been scored, or found to be such as cannot be."""
    path = clips / "scores" / "summary.json"
    if not path.exists():
        return 0
    summary = json.loads(path.read_text(encoding="utf-8"))
    return summary["n"] + len(summary["failures"])


def _seconds(clips: Path) -> float:
    """What they took to make and score, but for calls that were killed."""
    path = clips / "scores" / "seconds.json"
    return json.loads(path.read_text()) if path.exists() else 0.0


def _clips(out: Path, arm: str, seed: int, step: int | None = None) -> Path:
    return out / "clips" / (f"{arm}-{seed}" if step is None else f"{arm}-{seed}-step-{step}")


def _rows(recipe: StudyRecipe, out: Path, jobs: Sequence[tuple[str, int]]) -> Iterator[Row]:
    """All scores there are. The caption is what clips are grouped by: equal ones are alike."""
    prompts = _prompts(recipe.prompts)
    for arm, seed in jobs:
        for step, count in recipe.parts_of(arm, seed):
            captions = {prompt.id: prompt.text for prompt in prompts[:count]}
            clips = _clips(out, arm, seed, step)
            if not _scored(clips):
                continue
            text = (clips / "scores" / "scores.jsonl").read_text(encoding="utf-8")
            for line in text.splitlines():
                row = json.loads(line)
                if row["prompt_id"] not in captions:
                    continue  # Of a study with more prompts, which this folder held before.
                known = {"arm": arm, "seed": seed, "step": step}
                known |= {"caption": captions[row["prompt_id"]], CHECKS_PASSED: _passed(row)}
                dropped = ("k", "model_digest")
                yield known | {key: value for key, value in row.items() if key not in dropped}


def _passed(row: Row) -> float:
    """Finer than PC, which wants all of them: it moves before that does."""
    of_pc = (f"{name}_passed" for name, check in CHECKS.items() if check.aspect == "pc")
    return float(np.mean([row[key] for key in of_pc if key in row]))


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


# What follows from the rows.


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
    theirs = {(row["prompt_id"], row["seed"]): float(row[score]) for row in control}
    by_caption: dict[str, list[float]] = defaultdict(list)
    by_seed: dict[int, list[float]] = defaultdict(list)
    for row in rows:
        other = theirs.get((row["prompt_id"], row["seed"]))
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
    arms: Mapping[str, Sequence[Row]], names: Sequence[str], control: str, score: str
) -> dict[str, Difference]:
    """These arms against the control in one score, with p adjusted for one another."""
    found = {name: compare(arms[name], arms[control], score) for name in names}
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


def tables(recipe: StudyRecipe, rows: Sequence[Row]) -> str:
    """Everything in Markdown: scores, differences to the control, single laws, and the curve."""
    at_end = by_arm(rows)
    groups: dict[str, list[str]] = defaultdict(list)
    for name, arm in recipe.arms.items():
        if at_end[name]:
            groups[arm.table].append(name)
    parts = []
    for group, names in groups.items():
        shown = [n for n in (BASE, recipe.control) if at_end[n] and n not in names] + names
        parts += [f"### {group.capitalize()}", _scores(recipe, at_end, shown)]
        compared = [name for name in names if name != recipe.control]
        if compared and at_end[recipe.control]:
            parts.append(_differences(at_end, compared, recipe.control))
        parts.append(_laws(at_end, shown))
    if curve := _curve(recipe, rows):
        parts.append(f"### On the way\n\n{curve}")
    return "\n\n".join(parts) + "\n"


def _scores(recipe: StudyRecipe, rows: dict[str, list[Row]], names: Sequence[str]) -> str:
    lines = [
        "| arm | what it is | clips | SA | PC | joint | checks | motion, px |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in names:
        arm = recipe.arms.get(name)
        cells = [name, arm.about if arm else "the model all start from", str(len(rows[name]))]
        for score in SCORES:
            passed = sum(bool(row[score]) for row in rows[name])
            low, high = wilson(passed, len(rows[name]))
            share = 100 * passed / len(rows[name])
            cells.append(f"{share:.1f} [{100 * low:.1f}, {100 * high:.1f}]")
        checks, motion = (np.mean([row[key] for row in rows[name]]) for key in MEASURED)
        cells += [f"{100 * checks:.1f}", f"{motion:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _differences(rows: dict[str, list[Row]], names: Sequence[str], control: str) -> str:
    lines = [
        f"| against {control} | score | points | 95 % | p | p, Holm | by seed | won, lost |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for score in (*SCORES, CHECKS_PASSED):
        for name, difference in family(rows, names, control, score).items():
            seeds = ", ".join(f"{value:+.1f}" for value in difference.by_seed)
            lines.append(
                f"| {name} | {score} | {difference.value:+.1f} | "
                f"[{difference.low:+.1f}, {difference.high:+.1f}] | {difference.p:.4f} | "
                f"{difference.p_holm:.4f} | "
                f"{seeds} | {difference.won}, {difference.lost} |"
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
    known = {prompt.id for prompt in _prompts(recipe.curve.prompts)}
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


def cost(study: Study) -> str:
    """Where the time went, in minutes: training and generating each arm, and all of it."""
    lines = ["| arm | training, min | generating and scoring, min |", "|---|---|---|"]
    spent = [0.0, 0.0]
    for arm in (BASE, *study.recipe.arms):
        both = [0.0, 0.0]
        for seed in study.recipe.seeds_of(arm):
            for step, _ in study.recipe.parts_of(arm, seed):
                both[1] += _seconds(_clips(study.out, arm, seed, step)) / 60
            if arm != BASE:
                both[0] += _training_seconds(study.out / "runs" / f"{arm}-{seed}") / 60
        spent = [a + b for a, b in zip(spent, both, strict=True)]
        lines.append(f"| {arm} | {both[0]:.1f} | {both[1]:.1f} |")
    lines.append(f"| all | {spent[0]:.1f} | {spent[1]:.1f} |")
    return "\n".join(lines)


def _training_seconds(path: Path) -> float:
    if not Run.is_one(path):
        return 0.0
    run = Run.open(path)
    rows = [json.loads(line) for line in run.log_path.read_text().splitlines()]
    optim = run.recipe.optim
    return len(rows) * optim.batch_size * optim.accumulate / rows[-1]["clips_per_second"]
