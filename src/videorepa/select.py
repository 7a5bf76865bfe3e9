"""Chooses the best of each prompt's clips by a score, and says what choosing among n clips does."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from videorepa.artifacts.clips import SELECTION, CaptionedClip, Key, clips_of, write_chosen
from videorepa.artifacts.scores import Row, Scores
from videorepa.artifacts.selection import (
    BestOfCurve,
    Candidate,
    LeftOut,
    ScoreColumn,
    Selection,
)
from videorepa.data.motion import motion
from videorepa.data.video import read_all
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.best_of import PromptSamples, Quantity, best_of
from videorepa.evaluation.pairs import rows_by_clip, subject
from videorepa.settings import plugins
from videorepa.system.checks import finite_number
from videorepa.system.files import atomic_folder, check_is_folder, short_name
from videorepa.system.progress import track
from videorepa.system.wording import count, shown

CLIPS = "a folder of clips, several of each prompt, as `videorepa generate --samples` writes them"


def select(
    videos: Path,
    out: Path,
    *,
    by: Path,
    column: str | None = None,
    judged_by: Path | None = None,
    judged_column: str | None = None,
    most: int | None = None,
) -> Selection:
    """Copy the best clip of each prompt into a folder in the layout of `generate`.

    Which way a score is better is the benchmark's to say. `selection.json` beside the clips has
    every clip's scores and motion, and the curves: for n from 1 to `most` the expected score of the
    best of n clips of a prompt, what it does to another score of the same clips, and to motion.
    They are of the prompts that have `most` clips with all scores, and each n is of all of these.

    Args:
        videos: A folder that `generate` wrote, with several samples of each prompt.
        out: Folder of the chosen clips. One that is there is kept if it is the same choice.
        by: A folder that `evaluate` wrote for these clips, or the scores.jsonl in it.
        column: The column of its rows to choose by; needed if clips can be ranked by several.
        judged_by: Scores of the same clips by which the choice is judged. They have no part in it.
        judged_column: The column to judge by.
        most: The curves' last n; by default the most clips that a prompt has.

    Raises:
        UserError: `out` holds something else; scores are of other clips, of clips that have changed
            since, or of another version; a benchmark cannot rank clips by that column; both scores
            are the same one; or no prompt has two clips to choose from.
    """
    check_is_folder(videos, CLIPS)
    clips, others = clips_of(videos)
    _check_differ(clips)
    chosen_by = _Column.read(by, column, clips)
    judge = None if judged_by is None else _Column.read(judged_by, judged_column, clips)
    if judge is None and judged_column is not None:
        raise UserError("--judged-column is a column of --judged-by. Name its scores, too.")
    if judge and (judge.of.rows, judge.of.column) == (chosen_by.of.rows, chosen_by.of.column):
        raise UserError(
            f"{judged_by} holds the very scores that clips are chosen by. Judge by another "
            "benchmark or column; a score's own curve is there without --judged-by."
        )
    selection = _selection(short_name(videos), clips, others, chosen_by, judge, most)
    if (out / SELECTION).exists():
        if differing := selection.differs_in(Selection.read(out)):
            raise UserError(
                f"{out} holds another choice; it differs in {', '.join(differing)}. Choose another "
                "folder with --out, or delete it."
            )
        return selection
    wanted = {(clip.prompt_id, clip.k) for clip in selection.chosen}
    with atomic_folder(out) as temporary:
        write_chosen(videos, temporary, [clip for clip in clips if clip.key in wanted])
        selection.write(temporary)
    return selection


def _check_differ(clips: Sequence[CaptionedClip]) -> None:
    """Raise UserError if two files say that they are the same sample."""
    paths: dict[Key, Path] = {}
    for clip in clips:
        if (earlier := paths.setdefault(clip.key, clip.path)) != clip.path:
            raise UserError(
                f"{earlier} and {clip.path.name} are both sample {clip.k} of {clip.prompt_id!r}, "
                "as their sidecars say. Take one away."
            )


@dataclass(frozen=True)
class _Column:
    """A column of scores, with its values.

    Attributes:
        values: By clip.
        missing: The reasons of clips that have a row and no value, or no row.
        rows: By clip.
        is_flag: Whether the values are flags.
    """

    of: ScoreColumn
    values: Mapping[Key, float]
    missing: Mapping[Key, str]
    rows: Mapping[Key, Row]
    is_flag: bool

    @classmethod
    def read(cls, path: Path, column: str | None, clips: Sequence[CaptionedClip]) -> _Column:
        """Read the scores of these clips. Raises UserError; see `select`."""
        scores = Scores.read(path.parent if path.is_file() else path)
        summary = scores.summary
        kind = plugins.description("benchmarks", summary.benchmark)
        if summary.version != kind.version:
            raise UserError(
                f"{scores.folder} is of version {summary.version} of {summary.benchmark}, which is "
                f"at version {kind.version} now. Run `videorepa evaluate` again."
            )
        ranked = kind.ranked_by()
        known = ", ".join(ranked) or "none"
        if column is None and len(ranked) != 1:
            raise UserError(
                f"{summary.benchmark} ranks clips by these columns: {known}. Name one of them with "
                "--column, or --judged-column for scores to judge by."
            )
        column = column or next(iter(ranked))
        if column not in ranked:
            raise UserError(
                f"{summary.benchmark} does not rank clips by {column!r}; it does by: {known}."
            )
        rows = rows_by_clip(scores.rows)
        if any("clip" not in row for row in rows.values()):
            raise UserError(
                f"{scores.folder} has rows that do not say of which video they are. Run `videorepa "
                "evaluate` again."
            )
        scores.check({clip.key: clip for clip in clips if clip.path.is_file()})
        values: dict[Key, float] = {}
        missing: dict[Key, str] = {}
        for clip in clips:
            row = rows.get(clip.key)
            if row is None:
                missing[clip.key] = scores.failures.get(clip.key, "it has no row in the scores")
            elif (value := finite_number(row.get(column))) is None:
                missing[clip.key] = _reason(row, column)
            else:
                values[clip.key] = value
        of = ScoreColumn(
            benchmark=summary.benchmark,
            version=summary.version,
            column=column,
            better=ranked[column],
            about=" ".join(summary.says) or None,
            rows=scores.digest,
        )
        is_flag = all(isinstance(rows[key][column], bool) for key in values)
        return cls(of, values, missing, rows, is_flag)

    def goodness(self, key: Key) -> float:
        """The value of a clip, with the sign by which more is better."""
        return self.values[key] if self.of.better == "higher" else -self.values[key]

    def clip(self, key: Key) -> str:
        """The digest of a clip's video."""
        return str(self.rows[key]["clip"])

    def curve(
        self,
        role: Literal["chosen by", "judged by"],
        prompts: Sequence[PromptSamples],
        quantity: Quantity,
        most: int,
    ) -> BestOfCurve:
        points = best_of(prompts, quantity, most, 100.0 if self.is_flag else 1.0)
        return BestOfCurve(role=role, label=str(self.of), percent=self.is_flag, points=points)


@dataclass(frozen=True)
class _Choice:
    """What a choice is made among.

    Attributes:
        clips: All clips of the folder.
        by: What they are chosen by.
        judge: What the choice is judged by, if anything.
        moved: The motion of each clip that can be chosen.
    """

    clips: Sequence[CaptionedClip]
    by: _Column
    judge: _Column | None
    moved: Mapping[Key, float]

    @cached_property
    def best(self) -> dict[str, Key]:
        """The best clip of each prompt that has one.

        Of several the one with the smallest digest, which says nothing of them nor of their order.
        """
        return {
            prompt: min(keys, key=lambda key: (-self.by.goodness(key), self.by.clip(key)))
            for prompt, keys in _by_prompt(self.clips, self.moved).items()
        }

    @cached_property
    def in_curves(self) -> dict[str, list[Key]]:
        """The clips of each prompt that have all scores."""
        judged = self.judge.values if self.judge else self.moved
        return _by_prompt(self.clips, self.moved.keys() & judged.keys())

    @property
    def tied(self) -> int:
        """The number of prompts in which several clips have the best score."""
        values = self.by.values
        best = Counter(key[0] for key in self.moved if values[key] == values[self.best[key[0]]])
        return sum(number > 1 for number in best.values())

    @property
    def repeated(self) -> int:
        """The number of clips that are the same file as an earlier one of their prompt."""
        return len(self.moved) - len({(key[0], self.by.clip(key)) for key in self.moved})

    @property
    def candidates(self) -> list[Candidate]:
        return [
            Candidate(
                prompt_id=key[0],
                k=key[1],
                clip=self.by.clip(key),
                score=self.by.values[key],
                judged=self.judge.values.get(key) if self.judge else None,
                motion=value,
                chosen=self.best[key[0]] == key,
            )
            for key, value in self.moved.items()
        ]

    @property
    def not_judged(self) -> dict[Key, str]:
        """The reasons of clips that can be chosen and have no other score."""
        missing = self.judge.missing if self.judge else {}
        return {key: missing[key] for key in self.moved if key in missing}

    def samples(self, most: int) -> list[PromptSamples]:
        """The prompts that have `most` clips with all scores."""
        return [
            PromptSamples(
                subject=str(subject(self.by.rows[keys[0]])),
                goodness=np.array([self.by.goodness(key) for key in keys]),
                score=np.array([self.by.values[key] for key in keys]),
                judged=np.array([self.judge.values[key] if self.judge else np.nan for key in keys]),
                motion=np.array([self.moved[key] for key in keys]),
            )
            for keys in self.in_curves.values()
            if len(keys) >= most
        ]

    def curves(self, prompts: Sequence[PromptSamples], most: int) -> list[BestOfCurve]:
        curves = [self.by.curve("chosen by", prompts, lambda prompt: prompt.score, most)]
        if self.judge:
            curves.append(
                self.judge.curve("judged by", prompts, lambda prompt: prompt.judged, most)
            )
        points = best_of(prompts, lambda prompt: prompt.motion, most)
        label = "motion in levels of 255"
        return [*curves, BestOfCurve(role="motion", label=label, percent=False, points=points)]


def _selection(
    source: str,
    clips: Sequence[CaptionedClip],
    others: Sequence[CaptionedClip],
    by: _Column,
    judge: _Column | None,
    most: int | None,
) -> Selection:
    moved, unreadable = _motions([clip for clip in clips if clip.key in by.values])
    choice = _Choice(clips, by, judge, moved)
    numbers = {prompt: len(keys) for prompt, keys in choice.in_curves.items()}
    largest = max(numbers.values(), default=0)
    if largest < 2:
        raise UserError(
            f"No prompt of {source} has two clips with all scores to choose from. Generate several "
            "of each (`generate --samples 8`) and score them all."
        )
    most = largest if most is None else most
    if not 2 <= most <= largest:
        raise UserError(f"--most is {most}; expected 2 to {largest}, the most clips of a prompt.")
    prompts = choice.samples(most)
    ids = dict.fromkeys(clip.prompt_id for clip in clips)
    short = {name: numbers.get(name, 0) for name in ids if numbers.get(name, 0) < most}
    return Selection(
        source=source,
        chosen_by=by.of,
        judged_by=judge.of if judge else None,
        most=most,
        prompts=len(prompts),
        captions=len({prompt.subject for prompt in prompts}),
        tied=choice.tied,
        repeated=choice.repeated,
        curves=choice.curves(prompts, most),
        clips=choice.candidates,
        not_scored=_left_out({**by.missing, **unreadable}),
        not_judged=_left_out(choice.not_judged),
        not_in_curves=_left_out({(name, None): count(n, "clip") for name, n in short.items()}),
        without_choice=_left_out(
            {(name, None): "no clip with a score" for name in ids if name not in choice.best}
        ),
        left_over=_left_out({clip.key: "no longer generated" for clip in others}),
    )


def _reason(row: Row, column: str) -> str:
    if column not in row:
        return f"its row has no {column}"
    invalid = row.get("invalid")
    reason = invalid.get(column) if isinstance(invalid, dict) else None
    return str(reason or f"its {column} is {shown(row[column])}, no finite number")


def _motions(clips: Sequence[CaptionedClip]) -> tuple[dict[Key, float], dict[Key, str]]:
    """The motion of each clip, and the reasons of those that cannot be read or have one frame."""
    moved: dict[Key, float] = {}
    failed: dict[Key, str] = {}
    for clip in track(clips, "motion"):
        try:
            frames = read_all(clip.path)[0]
        except ClipError as error:
            failed[clip.key] = str(error)
            continue
        if len(frames) < 2:
            failed[clip.key] = "it has one frame"
        else:
            moved[clip.key] = motion(frames)
    return moved, failed


def _by_prompt(clips: Sequence[CaptionedClip], keys: Collection[Key]) -> dict[str, list[Key]]:
    """The clips that are among these, by prompt."""
    found: dict[str, list[Key]] = defaultdict(list)
    for clip in clips:
        if clip.key in keys:
            found[clip.prompt_id].append(clip.key)
    return found


def _left_out(reasons: Mapping[Any, str]) -> list[LeftOut]:
    """Clips, or prompts under the number None, with their reasons."""
    return [LeftOut(prompt_id=name, k=k, reason=reason) for (name, k), reason in reasons.items()]
