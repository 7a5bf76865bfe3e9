"""The gallery: clips side by side, with remarks on each, and the values to filter them by."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from videorepa.artifacts.clips import Key, Sidecar
from videorepa.artifacts.run import Run, ValidationClip
from videorepa.artifacts.scores import Scores, failing_checks
from videorepa.system.wording import count, label, number

SAMPLE_STEPS = 4
"""Largest number of steps at which a run's validation clips are shown."""

LETTERS = {True: "1", False: "0", None: "-"}
"""How a cell spells its verdicts, for the page's filters."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class Badge:
    """A metric's value below a clip. Its kind is "pass", "fail" or "plain"."""

    text: str
    kind: str


@dataclass(frozen=True)
class Cell:
    """A clip in a row, or its empty place.

    Attributes:
        label: Name of the model, or the step of the training.
        colour: Number of the model's colour; None for a step of the training.
        clip: The video; None if there is none.
        fps: Frames per second.
        verdicts: A letter for each of the gallery's verdicts: 1 for a clip that passes, 0 for one
            that fails, - for one without the verdict.
        fails: Positions, in the gallery's `checks`, of the checks that the clip fails.
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
class ClipRow:
    """Clips to compare with each other.

    Attributes:
        before: The image that the clips continue, and what happened in their place, if any.
        k: Number of the prompt's sample.
        category: Position in the gallery's `categories`.
    """

    prompt: str
    note: str
    cells: Sequence[Cell]
    prompt_id: str = ""
    k: int = 0
    category: int | None = None
    before: Sequence[Cell] = ()

    @property
    def clips(self) -> Iterator[Path]:
        return (cell.clip for cell in (*self.before, *self.cells) if cell.clip)


@dataclass(frozen=True)
class Gallery:
    """Rows of clips, and the values to filter them by.

    Attributes:
        checks: Names of checks that a clip may fail.
        verdicts: Names of metrics that a clip may pass or fail.
        left_out: A sentence about prompts that are not shown.
    """

    rows: Sequence[ClipRow]
    models: Sequence[str]
    categories: Sequence[str]
    checks: Sequence[str]
    verdicts: Sequence[str]
    left_out: str


@dataclass(frozen=True)
class _ClipResults:
    """The results of all benchmarks for one clip, by the metric's name.

    Attributes:
        verdicts: Whether the clip passes, for metrics that a clip passes or fails.
        scores: The scores behind the verdicts, where the benchmark has such scores.
        values: Values of metrics that a clip neither passes nor fails, in the table's unit.
        fails: Names of the checks that it fails.
        failures: Why it could not be scored.
    """

    category: str | None
    verdicts: Mapping[str, bool]
    scores: Mapping[str, float]
    values: Mapping[str, float]
    fails: Sequence[str]
    failures: Sequence[str]


def _results(evaluations: Sequence[Scores], key: Key, several: bool) -> _ClipResults:
    """Collect a clip's results.

    Args:
        several: Whether metrics need the benchmark's name, since several benchmarks are shown.
    """
    category, verdicts, deciding, values, fails, failures = None, {}, {}, {}, [], []
    for scores in evaluations:
        benchmark = f"{scores.summary.benchmark} " if several else ""
        if key in scores.failures:
            failures.append(scores.failures[key])
        row = scores.by_clip.get(key)
        if row is None:
            continue
        category = category or row.get("scenario")
        fails += failing_checks(row)
        for metric, of_all in scores.summary.metrics.items():
            value = row.get(metric)
            if of_all.percent is None:
                continue
            if isinstance(value, bool):
                verdicts[benchmark + label(metric)] = value
                # The score behind sa is sa_score or sa_rating.
                longer = (name for name in scores.summary.metrics if name.startswith(f"{metric}_"))
                score = row.get(next(longer, ""))
                if isinstance(score, int | float):
                    deciding[benchmark + label(metric)] = score
            elif isinstance(value, int | float):
                values[benchmark + label(metric)] = 100 * value if of_all.fractions else value
    return _ClipResults(category, verdicts, deciding, values, fails, failures)


def clip_gallery(
    clips: Mapping[str, Mapping[Key, Sidecar]],
    scored: Mapping[str, Sequence[Scores]],
    colours: Mapping[str, int],
    most: int | None,
) -> Gallery:
    """Make a row for each prompt and sample.

    Args:
        clips: Each model's clips.
        scored: Each model's scores, one per benchmark.
        colours: Each model's colour.
        most: Largest number of prompts, evenly spaced by id; None shows all.
    """
    every = sorted({key for of_model in clips.values() for key in of_model})
    prompts = sorted({prompt_id for prompt_id, _ in every})
    shown = set(_spread(prompts, most))
    keys = [key for key in every if key[0] in shown]
    benchmarks = {item.summary.benchmark for of_model in scored.values() for item in of_model}
    results = {
        (name, key): _results(scored.get(name, ()), key, len(benchmarks) > 1)
        for name in clips
        for key in keys
    }
    categories = sorted({clip.category for clip in results.values() if clip.category})
    checks = sorted({check for clip in results.values() for check in clip.fails})
    verdicts = list(dict.fromkeys(name for clip in results.values() for name in clip.verdicts))

    def cell(name: str, key: Key, present: Sequence[Sidecar]) -> Cell:
        clip, of_clip = clips[name].get(key), results[name, key]
        like = clip or present[0]
        remarks = [f"not scored: {reason}" for reason in of_clip.failures]
        if clip and clip.seed is not None and len({other.seed for other in present}) > 1:
            remarks.append(f"seed {clip.seed}")
        if clip and not clip.image and any(other.kept_image for other in present):
            remarks.append("not shown the given frame")
        if clip and of_clip.fails:
            remarks.append(f"fails {', '.join(of_clip.fails)}")
        return Cell(
            label=name,
            colour=colours[name],
            clip=clip.path if clip else None,
            width=like.width,
            height=like.height,
            fps=like.fps,
            badges=_badges(of_clip) if clip else (),
            note="; ".join(remarks),
            verdicts="".join(LETTERS[of_clip.verdicts.get(verdict)] for verdict in verdicts),
            fails=sorted({checks.index(check) for check in of_clip.fails}),
        )

    rows = []
    for key in keys:
        present = [of_model[key] for of_model in clips.values() if key in of_model]
        category = next((c for name in clips if (c := results[name, key].category)), None)
        rows.append(
            ClipRow(
                prompt=present[0].prompt,
                note=_note(key, category, present),
                cells=[cell(name, key, present) for name in clips],
                prompt_id=key[0],
                k=key[1],
                category=categories.index(category) if category else None,
                before=_before(present),
            )
        )
    left_out = ""
    if len(shown) < len(prompts):
        left_out = (
            f"{count(len(prompts) - len(shown), 'prompt')} of {len(prompts)} left out. Those "
            "shown are evenly spaced by id, not chosen by result."
        )
    return Gallery(rows, list(clips), categories, checks, verdicts, left_out)


def _before(present: Sequence[Sidecar]) -> list[Cell]:
    """The image that the clips continue and what was filmed, of the first folder that has them."""
    images = {path.name: (clip, path) for clip in present if (path := clip.kept_image)}
    films = [(clip, path) for clip in present if (path := clip.kept_film)]
    note = "the clips continue different images; this is the first's" if len(images) > 1 else ""
    found = [("given frame", note, *each) for each in list(images.values())[:1]]
    found += [("what happened", "", *each) for each in films[:1]]
    return [
        Cell(label, None, path, clip.width, clip.height, clip.fps, note=remark)
        for label, remark, clip, path in found
    ]


def _note(key: Key, category: str | None, present: Sequence[Sidecar]) -> str:
    seeds = {clip.seed for clip in present}
    parts = [category] if category else []
    parts += [key[0], f"sample {key[1]}"]
    if seeds != {None}:
        parts.append(f"seed {present[0].seed}" if len(seeds) == 1 else "different seeds")
    if len({clip.prompt for clip in present}) > 1:
        parts.append("different wordings of the prompt; the first is shown")
    return ", ".join(parts)


def _badges(results: _ClipResults) -> list[Badge]:
    flags = []
    for name, flag in results.verdicts.items():
        word = "pass" if flag else "fail"
        score = f" ({results.scores[name]:.3g})" if name in results.scores else ""
        flags.append(Badge(f"{name} {word}{score}", word))
    values = [Badge(f"{name} {number(value)}", "plain") for name, value in results.values.items()]
    return flags + values


def validation_rows(run: Run, most: int | None) -> list[ClipRow]:
    """Make a row for each of at most `most` validation clips, at a few steps of the training."""
    by_step = run.validation_clips
    names = sorted({name for clips in by_step.values() for name in clips})
    steps = _spread(list(by_step), SAMPLE_STEPS)
    rows = []
    for name in _spread(names, most):
        shown: dict[int, ValidationClip | None] = {step: by_step[step].get(name) for step in steps}
        present = next((clip for clip in shown.values() if clip), None)
        if present is None:
            continue
        cells = [
            Cell(
                label=f"step {step}" if step else "base model",
                colour=None,
                clip=clip.path if clip else None,
                width=present.width,
                height=present.height,
                fps=present.fps,
            )
            for step, clip in shown.items()
        ]
        rows.append(ClipRow(present.prompt, name if name != present.prompt else "", cells))
    return rows


def _spread(items: Sequence[Item], most: int | None) -> list[Item]:
    """At most `most` of the items, evenly spaced, with the first and the last among them."""
    if most is None or len(items) <= most:
        return list(items)
    return [items[index] for index in np.linspace(0, len(items) - 1, most).round().astype(int)]
