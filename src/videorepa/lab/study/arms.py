"""The lab's study: what alignment changes, for the same base model, clips and steps."""

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

from videorepa.artifacts.finished import read_finished
from videorepa.artifacts.model import Model
from videorepa.artifacts.reading import read_record
from videorepa.artifacts.run import Run
from videorepa.artifacts.scores import PASSED, Summary, scored_rows
from videorepa.benchmarks.laws.checks import CHECKS, packaged_tolerances
from videorepa.data.manifest import Prompt
from videorepa.errors import UserError
from videorepa.evaluate import evaluate
from videorepa.generate import generate
from videorepa.lab.study.measures import Meter
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.lab.study.rows import (
    CHECKS_PASSED,
    VIOLATION,
    Row,
    means_of_clips,
    read_rows,
    rows_text,
)
from videorepa.lab.study.seeds import measured_text, read_measured
from videorepa.lab.study.tables import all_tables
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.system.device import keep_freed_memory
from videorepa.system.files import atomic_write, is_vacant, parse_json, read_bytes
from videorepa.system.lock import SUFFIX, sole_user
from videorepa.system.progress import console
from videorepa.train import train

ROWS, MEASURED = "rows.csv", "measured.csv"

MEASURED_AS_STEPS = 120
"""About how many training steps take as long as measuring a model; for the time left alone."""


@dataclass(frozen=True)
class Study:
    """The results of a study.

    Attributes:
        rows: The scores of every clip.
        measured: What was measured on every model without sampling from it.
        missing: Arms and seeds that are not finished.
    """

    recipe: StudyRecipe
    out: Path
    rows: list[Row]
    measured: list[Row]
    missing: list[str]

    @cached_property
    def tables(self) -> str:
        """The tables in Markdown. They are cached, since each interval needs ten thousand draws."""
        return all_tables(self.recipe, self.rows, self.measured)


def study(recipe: StudyRecipe, out: Path, *, shard: tuple[int, int] = (0, 1)) -> Study:
    """Train, generate and score every arm with every seed, resuming where an earlier call stopped.

    Args:
        out: Gets rows.csv, with a row for every clip, measured.csv, with what was measured on every
            model, and tables.md once everything is done.
        shard: (i, n) does every n-th arm and seed, from the i-th on.

    Raises:
        UserError: `out` is not a study's folder, has runs or clips of another recipe, or another
            process does the same shard.
    """
    index, count = shard
    with sole_user(out, f".shard-{index}-of-{count}{SUFFIX}"):
        return _study(recipe, out, index, count)


def _study(recipe: StudyRecipe, out: Path, index: int, count: int) -> Study:
    _claim(recipe, out)
    keep_freed_memory()
    jobs = recipe.jobs()
    mine = jobs[index::count]
    arms = dict.fromkeys(arm for arm, _ in mine if arm != BASE)
    needed = [_with_cache(recipe.trained(arm, recipe.seeds[0]), out) for arm in arms]
    for part in ((index, count), (0, 1)):  # The second pass does what other processes left.
        for of_arm in needed:
            prepare(of_arm, shard=part)
    meter = Meter(recipe.recipe, recipe.measures, out) if recipe.measures else None
    for arm, seed in _with_time_left(recipe, out, mine):
        _run(recipe, out, arm, seed, meter)
    rows = list(_rows(recipe, out, jobs))
    if rows:  # An empty shard may find no finished job.
        atomic_write(out / ROWS, rows_text(rows))
        rows = read_rows(out / ROWS)  # So that the tables are about the file's rounded numbers.
    measured = list(_measured(recipe, out, jobs))
    if measured:
        measured += means_of_clips(rows)
        atomic_write(out / MEASURED, measured_text(measured))
        measured = read_measured(out / MEASURED)
    missing = [
        f"{arm}, seed {seed}"
        for arm, seed in jobs
        if _clips_left(recipe, out, arm, seed) or _measures_left(recipe, out, arm, seed)
    ]
    result = Study(recipe, out, rows, measured, missing)
    if not missing:
        atomic_write(out / "tables.md", result.tables)
    return result


def _claim(recipe: StudyRecipe, out: Path) -> None:
    """Make the folder and write the recipe into it.

    It may hold results of another recipe, so that arms and prompts can be added to a study. Each
    verb refuses results that do not fit.
    """
    path = out / "study.yaml"
    if not path.exists() and not is_vacant(out):
        raise UserError(f"{out} exists and is not a study. Choose another folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(path, yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False))


def _with_cache(recipe: Recipe, out: Path) -> Recipe:
    return recipe.override(f"data.cache={out / 'cache'}")


def _prompts(recipe: StudyRecipe) -> list[Prompt]:
    return plugins.benchmark(recipe.benchmark).prompts(recipe.prompts, seed=0)


def _run(recipe: StudyRecipe, out: Path, arm: str, seed: int, meter: Meter | None) -> None:
    prompts = _prompts(recipe)
    if arm == BASE:
        model = out / f"{BASE}.yaml"
        _with_cache(recipe.recipe, out).to_yaml(model)
    else:
        model = train(_with_cache(recipe.trained(arm, seed), out), run_folder(out, arm, seed)).path
    if meter is not None and (arm, seed) in recipe.asked():
        meter.measure(Model.of(model), measured_path(out, arm, seed))
    for step, count in recipe.parts_of(arm, seed):
        clips = clips_folder(out, arm, seed, step)
        begun, more = time.monotonic(), _scored(clips) < count
        bench = plugins.benchmark(recipe.benchmark)
        generate(model, prompts[:count], clips, seed=seed, step=step, benchmark=bench)
        evaluate(recipe.benchmark, clips)
        if more:
            seconds = _seconds(clips) + time.monotonic() - begun
            atomic_write(clips / "scores" / "seconds.json", json.dumps(seconds))


def _with_time_left(
    recipe: StudyRecipe, out: Path, jobs: Sequence[tuple[str, int]]
) -> Iterator[tuple[str, int]]:
    """Yield each job after printing it, with the time left at the pace so far."""
    todo = [
        _steps_left(recipe, out, *job)
        + _clips_left(recipe, out, *job)
        + MEASURED_AS_STEPS * _measures_left(recipe, out, *job)
        for job in jobs
    ]
    begun, done = time.monotonic(), 0
    for number, (arm, seed) in enumerate(jobs):
        left = ""
        if done:
            minutes = (time.monotonic() - begun) / done * sum(todo[number:]) / 60
            left = f", about {minutes:.0f} min left"
        console.print(f"{number + 1}/{len(jobs)}  {arm}, seed {seed}{left}", style="bold")
        yield arm, seed
        done += todo[number]


def _measures_left(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> bool:
    return (arm, seed) in recipe.asked() and not measured_path(out, arm, seed).exists()


def _measured(recipe: StudyRecipe, out: Path, jobs: Sequence[tuple[str, int]]) -> Iterator[Row]:
    """What was measured so far, by arm and seed."""
    for arm, seed in jobs:
        path = measured_path(out, arm, seed)
        if (arm, seed) in recipe.asked():
            for row in read_finished(path, {}, list[Row]) or ():
                yield {"arm": arm, "seed": seed} | row


def _steps_left(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> int:
    if arm == BASE:
        return 0
    return recipe.trained(arm, seed).optim.steps - len(_logged(run_folder(out, arm, seed)))


def _clips_left(recipe: StudyRecipe, out: Path, arm: str, seed: int) -> int:
    """Number of clips that are not yet scored."""
    parts = recipe.parts_of(arm, seed)
    return sum(max(0, count - _scored(clips_folder(out, arm, seed, step))) for step, count in parts)


def _scored(clips: Path) -> int:
    """Number of clips that were scored, or could not be."""
    path = clips / "scores" / "summary.json"
    if not path.exists():
        return 0
    summary = read_record(Summary, path)
    return summary.n + len(summary.failures)


def _seconds(clips: Path) -> float:
    """Seconds spent on generating and scoring the clips, without calls that were killed."""
    path = clips / "scores" / "seconds.json"
    if not path.exists():
        return 0.0
    try:
        return float(parse_json(read_bytes(path)))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no number ({error}). Delete it.") from None


def run_folder(out: Path, arm: str, seed: int) -> Path:
    """The folder of an arm's training in a study's folder."""
    return out / "runs" / f"{arm}-{seed}"


def measured_path(out: Path, arm: str, seed: int) -> Path:
    """The file of what was measured on an arm's model, in a study's folder."""
    return out / "measured" / f"{arm}-{seed}.json"


def clips_folder(out: Path, arm: str, seed: int, step: int | None = None) -> Path:
    """The folder of an arm's clips in a study's folder, made at a step or at the end."""
    return out / "clips" / (f"{arm}-{seed}" if step is None else f"{arm}-{seed}-step-{step}")


def _rows(recipe: StudyRecipe, out: Path, jobs: Sequence[tuple[str, int]]) -> Iterator[Row]:
    """All scores so far, with the captions by which clips are grouped."""
    prompts = _prompts(recipe)
    for arm, seed in jobs:
        for step, count in recipe.parts_of(arm, seed):
            captions = {prompt.id: prompt.text for prompt in prompts[:count]}
            clips = clips_folder(out, arm, seed, step)
            if not _scored(clips):
                continue
            # The rows alone: another process may be adding some, whose summary is still to come.
            for row in scored_rows(clips / "scores"):
                if row["prompt_id"] not in captions:
                    continue  # Of an earlier study in this folder, with more prompts.
                about = {"arm": arm, "seed": seed, "step": step}
                about |= {"caption": captions[row["prompt_id"]], CHECKS_PASSED: _passed(row)}
                about[VIOLATION] = _violation(row)
                yield about | {
                    key: value
                    for key, value in row.items()
                    if key not in ("k", "model_digest", "clip")
                    and not isinstance(value, list | dict)  # What is by frame stays with the clips.
                }


def _passed(row: Row) -> float:
    """Share of PC's checks that pass, in [0, 1]. It varies among clips that fail PC."""
    return float(np.mean([row[f"{name}{PASSED}"] for name in _checks_of_pc(row)]))


def _violation(row: Row) -> float:
    """Mean over PC's checks of log2(value / tolerance), each clipped to -2 to 3.

    It varies even among clips that pass, or fail, the same checks.
    """
    limits = packaged_tolerances()
    logs = []
    for name in _checks_of_pc(row):
        # A tolerance of 0 is either met or exceeded without bound.
        ratio = row[f"{name}_value"] / limits[name] if limits[name] else math.inf
        logs.append(math.log2(ratio) if row[f"{name}_value"] > 0 else -math.inf)
    return float(np.mean(np.clip(logs, -2.0, 3.0)))


def _checks_of_pc(row: Row) -> list[str]:
    """The checks of PC that apply to the clip."""
    return [n for n, check in CHECKS.items() if check.aspect == "pc" and f"{n}{PASSED}" in row]


def cost(recipe: StudyRecipe, out: Path) -> str:
    """A table in Markdown of the time that a study took, in minutes of one process.

    For each arm, over all of its seeds, it has the time of training and that of generating and
    scoring, and then the totals.
    """
    lines = ["| arm | training, min | generating and scoring, min |", "|---|---|---|"]
    minutes = np.zeros((1 + len(recipe.arms), 2))
    for spent, arm in zip(minutes, (BASE, *recipe.arms), strict=True):
        for seed in recipe.seeds_of(arm):
            if arm != BASE:
                spent[0] += _training_seconds(run_folder(out, arm, seed)) / 60
            for step, _ in recipe.parts_of(arm, seed):
                spent[1] += _seconds(clips_folder(out, arm, seed, step)) / 60
        lines.append(f"| {arm} | {spent[0]:.1f} | {spent[1]:.1f} |")
    training, scoring = minutes.sum(0)
    return "\n".join([*lines, f"| all | {training:.1f} | {scoring:.1f} |"])


def _training_seconds(path: Path) -> float:
    if not (steps := _logged(path)):
        return 0.0
    optim = Run.open(path).recipe.optim
    return len(steps) * optim.batch_size * optim.accumulate / steps[-1]["clips_per_second"]


def _logged(path: Path) -> list[dict[str, Any]]:
    return Run.open(path).log if Run.is_one(path) else []
