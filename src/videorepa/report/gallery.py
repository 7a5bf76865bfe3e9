"""The gallery: which clips stand side by side, what is said of each, and what they are found by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from videorepa.artifacts.clips import Key, Sidecar
from videorepa.artifacts.run import LoggedRun, Sample
from videorepa.artifacts.scores import Scores
from videorepa.system.wording import count, label, number

SAMPLE_STEPS = 4
"""How many moments of a training its validation clips are shown at."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Badge:
    text: str
    kind: str


@dataclass(frozen=True)
class Cell:
    """A clip in a row, or the reason why there is none. fps is in frames per second.

    verdicts: a letter for each of the gallery's verdicts: passes (1), fails (0), or unknown (-).
    fails: places of the checks it fails in the gallery's list of them.
    """

    label: str
    colour: int | None
    clip: Path | None
    width: int
    height: int
    fps: float
    badges: Sequence[Badge] = ()
    note: str = ""
    verdicts: str = ""
    fails: Sequence[int] = ()


@dataclass(frozen=True)
class Row:
    """Clips to compare with each other. category: place in the gallery's list of them."""

    prompt: str
    note: str
    cells: Sequence[Cell]
    prompt_id: str = ""
    k: int = 0
    category: int | None = None

    @property
    def clips(self) -> Iterator[Path]:
        return (cell.clip for cell in self.cells if cell.clip)


@dataclass(frozen=True)
class Gallery:
    """Rows of clips, and what they can be filtered by. left_out: what is not shown, in words."""

    rows: Sequence[Row]
    models: Sequence[str]
    categories: Sequence[str]
    checks: Sequence[str]
    verdicts: Sequence[str]
    left_out: str


@dataclass(frozen=True)
class _Judged:
    """What all benchmarks say of one clip. verdicts: by name, only those that are known. scores:
    what those were decided by, where a benchmark has it."""

    category: str | None
    verdicts: Mapping[str, bool]
    scores: Mapping[str, float]
    values: Mapping[str, float]
    fails: Sequence[str]
    failures: Sequence[str]


def _judge(evaluations: Sequence[Scores], key: Key, several: bool) -> _Judged:
    category, verdicts, decided, values, fails, failures = None, {}, {}, {}, [], []
    for scores in evaluations:
        benchmark = f"{scores.summary.benchmark} " if several else ""
        if key in scores.failures:
            failures.append(scores.failures[key])
        row = scores.rows.get(key)
        if row is None:
            continue
        category = category or row.scenario
        fails += row.failing_checks
        for metric, of_all in scores.summary.metrics.items():
            flag, value = row.flag(metric), getattr(row, metric, None)
            if of_all.percent is None:
                continue
            if flag is not None:
                verdicts[benchmark + label(metric)] = flag
                # As sa_score stands beside sa.
                beside = (name for name in scores.summary.metrics if name.startswith(f"{metric}_"))
                score = getattr(row, next(beside, ""), None)
                if isinstance(score, int | float):
                    decided[benchmark + label(metric)] = score
            elif isinstance(value, float):
                values[benchmark + label(metric)] = value
    return _Judged(category, verdicts, decided, values, fails, failures)


def clip_gallery(
    clips: Mapping[str, Mapping[Key, Sidecar]],
    scored: Mapping[str, Sequence[Scores]],
    colours: Mapping[str, int],
    most: int | None,
) -> Gallery:
    """A row for each prompt and sample, of at most so many prompts, evenly spaced by id."""
    every = sorted({key for found in clips.values() for key in found})
    prompts = sorted({prompt_id for prompt_id, _ in every})
    shown = set(_spread(prompts, most))
    keys = [key for key in every if key[0] in shown]
    benchmarks = {item.summary.benchmark for found in scored.values() for item in found}
    judged = {
        (name, key): _judge(scored.get(name, ()), key, len(benchmarks) > 1)
        for name in clips
        for key in keys
    }
    categories = sorted({found.category for found in judged.values() if found.category})
    checks = sorted({check for found in judged.values() for check in found.fails})
    verdicts = list(dict.fromkeys(name for found in judged.values() for name in found.verdicts))

    def cell(name: str, key: Key, present: Sequence[Sidecar]) -> Cell:
        clip, found = clips[name].get(key), judged[name, key]
        like = clip or present[0]
        remarks = [f"not scored: {reason}" for reason in found.failures]
        if clip and clip.seed is not None and len({other.seed for other in present}) > 1:
            remarks.append(f"seed {clip.seed}")
        if clip and found.fails:
            remarks.append(f"fails {', '.join(found.fails)}")
        return Cell(
            label=name,
            colour=colours[name],
            clip=clip.path if clip else None,
            width=like.width,
            height=like.height,
            fps=like.fps,
            badges=_badges(found) if clip else (),
            note="; ".join(remarks),
            verdicts="".join(_letter(found.verdicts.get(verdict)) for verdict in verdicts),
            fails=sorted({checks.index(check) for check in found.fails}),
        )

    rows = []
    for prompt_id, k in keys:
        key = (prompt_id, k)
        present = [found[key] for found in clips.values() if key in found]
        category = next((c for name in clips if (c := judged[name, key].category)), None)
        rows.append(
            Row(
                prompt=present[0].prompt,
                note=_note(key, category, present),
                cells=[cell(name, key, present) for name in clips],
                prompt_id=prompt_id,
                k=k,
                category=categories.index(category) if category else None,
            )
        )
    left_out = ""
    if len(shown) < len(prompts):
        left_out = (
            f"{count(len(prompts) - len(shown), 'prompt')} of {len(prompts)} left out; those "
            "shown are evenly spaced by id, not chosen by result."
        )
    return Gallery(rows, list(clips), categories, checks, verdicts, left_out)


def _note(key: Key, category: str | None, present: Sequence[Sidecar]) -> str:
    seeds = {clip.seed for clip in present}
    parts = [category] if category else []
    parts += [f"{key[0]}", f"sample {key[1]}"]
    if seeds != {None}:
        parts.append(f"seed {present[0].seed}" if len(seeds) == 1 else "different seeds")
    if len({clip.prompt for clip in present}) > 1:
        parts.append("different wordings of the prompt; the first is shown")
    return ", ".join(parts)


def _letter(flag: bool | None) -> str:
    return "-" if flag is None else str(int(flag))


def _badges(found: _Judged) -> list[Badge]:
    flags = []
    for name, flag in found.verdicts.items():
        word = "pass" if flag else "fail"
        score = f" ({found.scores[name]:.3g})" if name in found.scores else ""
        flags.append(Badge(f"{name} {word}{score}", word))
    values = [Badge(f"{name} {number(value)}", "plain") for name, value in found.values.items()]
    return flags + values


def sample_rows(run: LoggedRun, most: int | None) -> list[Row]:
    """A row per validation clip, at a few moments of the training."""
    names = sorted({name for clips in run.samples.values() for name in clips})
    steps = _spread(list(run.samples), SAMPLE_STEPS)
    rows = []
    for name in _spread(names, most):
        shown: dict[int, Sample | None] = {step: run.samples[step].get(name) for step in steps}
        present = next((sample for sample in shown.values() if sample), None)
        if present is None:
            continue
        cells = [
            Cell(
                label=f"step {step}" if step else "base model",
                colour=None,
                clip=sample.path if sample else None,
                width=present.width,
                height=present.height,
                fps=present.fps,
            )
            for step, sample in shown.items()
        ]
        rows.append(Row(present.prompt, name if name != present.prompt else "", cells))
    return rows


def _spread(items: Sequence[Item], most: int | None) -> list[Item]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]
