"""The lab's question, answered with error bars: the same base model, clips and steps, and only the
alignment differs."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from videorepa.artifacts.run import Run
from videorepa.benchmarks.laws.checks import CHECKS, packaged_tolerances
from videorepa.data.manifest import Prompt
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.generate import generate
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.lab.study.tables import CHECKS_PASSED, VIOLATION, Row, read_rows, rows_text, tables
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.system.device import keep_freed_memory
from videorepa.system.files import atomic_write, is_vacant
from videorepa.system.progress import console
from videorepa.train import train

ROWS = "rows.csv"


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
    return plugins.benchmark("lab").prompts(count, seed=0)


def _do(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> None:
    prompts = _prompts(recipe.prompts)
    if arm == BASE:
        model = out / f"{BASE}.yaml"
        _placed(recipe.recipe, out).to_yaml(model)
    else:
        model = train(_placed(recipe.trained(arm, seed), out), run_folder(out, arm, seed)).path
    for step, count in recipe.parts_of(arm, seed):
        clips = clips_folder(out, arm, seed, step)
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
    return recipe.trained(arm, seed).optim.steps - len(_logged(run_folder(out, arm, seed)))


def _clips_left(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> int:
    """How many are still to be scored."""
    parts = recipe.parts_of(arm, seed)
    return sum(max(0, count - _scored(clips_folder(out, arm, seed, step))) for step, count in parts)


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


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """Where a study in `out` keeps the training of an arm."""
    return out / "runs" / f"{arm}-{seed}"


def clips_folder(out: Path, arm: str, seed: int, step: int | None = None) -> Path:
    """Where it keeps the clips of an arm: made at a step, or at the end."""
    return out / "clips" / (f"{arm}-{seed}" if step is None else f"{arm}-{seed}-step-{step}")


def _rows(recipe: StudyRecipe, out: Path, jobs: Sequence[tuple[str, int]]) -> Iterator[Row]:
    """All scores there are. The caption is what clips are grouped by: equal ones are alike."""
    prompts = _prompts(recipe.prompts)
    for arm, seed in jobs:
        for step, count in recipe.parts_of(arm, seed):
            captions = {prompt.id: prompt.text for prompt in prompts[:count]}
            clips = clips_folder(out, arm, seed, step)
            if not _scored(clips):
                continue
            text = (clips / "scores" / "scores.jsonl").read_text(encoding="utf-8")
            for line in text.splitlines():
                row = json.loads(line)
                if row["prompt_id"] not in captions:
                    continue  # Of a study with more prompts, which this folder held before.
                known = {"arm": arm, "seed": seed, "step": step}
                known |= {"caption": captions[row["prompt_id"]], CHECKS_PASSED: _passed(row)}
                known[VIOLATION] = _violation(row)
                dropped = ("k", "model_digest")
                yield known | {key: value for key, value in row.items() if key not in dropped}


def _passed(row: Row) -> float:
    """Finer than PC, which wants all of them: it moves before that does."""
    return float(np.mean([row[f"{name}_passed"] for name in _checks_of_pc(row)]))


def _violation(row: Row) -> float:
    """Finer still: what passes can pass by more, and what fails fail by less."""
    limits = packaged_tolerances()
    found = []
    for name in _checks_of_pc(row):
        # A tolerance of 0 is met or not.
        share = row[f"{name}_value"] / limits[name] if limits[name] else math.inf
        found.append(math.log2(share) if row[f"{name}_value"] > 0 else -math.inf)
    return float(np.mean(np.clip(found, -2.0, 3.0)))


def _checks_of_pc(row: Row) -> list[str]:
    """Those that apply to the clip."""
    return [name for name, of in CHECKS.items() if of.aspect == "pc" and f"{name}_passed" in row]


def cost(recipe: StudyRecipe, out: Path) -> str:
    """Where the time of the study in `out` went, in Markdown: training and generating each arm with
    all its seeds, and all of it. In minutes of one process."""
    lines = ["| arm | training, min | generating and scoring, min |", "|---|---|---|"]
    spent = [0.0, 0.0]
    for arm in (BASE, *recipe.arms):
        both = [0.0, 0.0]
        for seed in recipe.seeds_of(arm):
            for step, _ in recipe.parts_of(arm, seed):
                both[1] += _seconds(clips_folder(out, arm, seed, step)) / 60
            if arm != BASE:
                both[0] += _training_seconds(run_folder(out, arm, seed)) / 60
        spent = [a + b for a, b in zip(spent, both, strict=True)]
        lines.append(f"| {arm} | {both[0]:.1f} | {both[1]:.1f} |")
    lines.append(f"| all | {spent[0]:.1f} | {spent[1]:.1f} |")
    return "\n".join(lines)


def _training_seconds(path: Path) -> float:
    if not (steps := _logged(path)):
        return 0.0
    optim = Run.open(path).recipe.optim
    return len(steps) * optim.batch_size * optim.accumulate / steps[-1]["clips_per_second"]


def _logged(path: Path) -> list[dict[str, Any]]:
    return Run.open(path).logged() if Run.is_one(path) else []
