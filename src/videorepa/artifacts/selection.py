"""Reads and writes the record of a choice: which clip of each prompt, by which score, and what
choosing among more clips does."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict

from videorepa.artifacts.clips import SELECTION, clip_digest, clips_of
from videorepa.artifacts.reading import read_record
from videorepa.artifacts.scores import Better
from videorepa.errors import UserError
from videorepa.system.files import atomic_write, short_name


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True)


class ScoreColumn(_Frozen):
    """A column of a benchmark's rows.

    Attributes:
        version: The benchmark's version.
        better: Which way a value is better.
        about: What the benchmark says of its metrics, if it says anything.
        rows: A digest of the rows.
    """

    benchmark: str
    version: str
    column: str
    better: Better
    about: str | None
    rows: str

    def __str__(self) -> str:
        return f"{self.column} of {self.benchmark}"


class BestOfPoint(_Frozen):
    """What to expect of the clip that is chosen among n of a prompt.

    Attributes:
        n: From how many clips, drawn without replacement, the best is taken.
        mean: Over prompts; of a flag, in percent.
        low: Lower end of the 95 % interval over captions.
        high: Upper end of it.
        change: The mean less that at n = 1, of the same prompts.
        change_low: Lower end of its 95 % interval.
        change_high: Upper end of it.
    """

    n: int
    mean: float
    low: float
    high: float
    change: float
    change_low: float
    change_high: float


class BestOfCurve(_Frozen):
    """A quantity of the chosen clip over n.

    Attributes:
        role: Whether it is what clips are chosen by, what they are judged by, or their motion.
        label: The quantity's name, with its unit.
        percent: Whether it is the share of a flag.
        points: For n = 1, 2 and so on.
    """

    role: Literal["chosen by", "judged by", "motion"]
    label: str
    percent: bool
    points: list[BestOfPoint]


class Candidate(_Frozen):
    """A clip that could be chosen.

    Attributes:
        clip: The digest of the video.
        score: What it is chosen by; a flag is 0 or 1.
        judged: The other score; None if there is none.
        motion: The mean distance of neighbouring frames, in levels of 255.
        chosen: Whether it is its prompt's best.
    """

    prompt_id: str
    k: int
    clip: str
    score: float
    judged: float | None
    motion: float
    chosen: bool


class LeftOut(_Frozen):
    """A clip or a prompt that does not count, and why. k is None for a prompt."""

    prompt_id: str
    k: int | None
    reason: str

    def __str__(self) -> str:
        k = "" if self.k is None else f" {self.k}"
        return f"{self.prompt_id!r}{k} ({self.reason})"


class Selection(_Frozen):
    """The best of each prompt's clips, and the curves over the number of clips.

    Attributes:
        source: The name of the clips' folder.
        most: The curves' last n.
        prompts: The number of prompts that the curves are of.
        captions: The number of their different captions.
        clips: All clips with a score.
        not_scored: Clips without a score, which cannot be chosen.
        not_judged: Clips with a score but without the other one, which the curves leave out.
        not_in_curves: Prompts with fewer clips than the curves' last n.
        without_choice: Prompts none of whose clips has a score.
        left_over: Clips of prompts that are no longer generated.
        tied: The number of prompts in which several clips have the best score.
        repeated: The number of clips that are the same file as an earlier one of their prompt.
    """

    source: str
    chosen_by: ScoreColumn
    judged_by: ScoreColumn | None
    most: int
    prompts: int
    captions: int
    tied: int
    repeated: int
    curves: list[BestOfCurve]
    clips: list[Candidate]
    not_scored: list[LeftOut]
    not_judged: list[LeftOut]
    not_in_curves: list[LeftOut]
    without_choice: list[LeftOut]
    left_over: list[LeftOut]

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read the record beside chosen clips.

        Raises:
            UserError: It is damaged, or a clip is gone or not the one that was chosen.
        """
        selection = read_record(cls, folder / SELECTION)
        there = {
            clip.key: clip_digest(clip.path) for clip in clips_of(folder)[0] if clip.path.is_file()
        }
        for clip in selection.chosen:
            if there.get((clip.prompt_id, 0)) != clip.clip:
                raise UserError(
                    f"{folder} does not hold the clip that was chosen of {clip.prompt_id!r}. "
                    "Delete the folder and run `videorepa select` again."
                )
        return selection

    def write(self, folder: Path) -> None:
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False)
        atomic_write(folder / SELECTION, text)

    @property
    def chosen(self) -> list[Candidate]:
        return [clip for clip in self.clips if clip.chosen]

    def differs_in(self, other: Self) -> list[str]:
        """What another choice was made with or came to, as far as it is another."""
        ours, theirs = self.model_dump(exclude={"curves"}), other.model_dump(exclude={"curves"})
        return [key for key, value in ours.items() if theirs[key] != value]

    @property
    def notes(self) -> list[str]:
        """What a reader of the curves has to know, in sentences."""
        by, judge = self.chosen_by, self.judged_by
        notes = [
            f"{by.column} is what clips are chosen by ({by.better} is better). That it gets better "
            "with n is the choice itself: this curve is optimistic, and says nothing of how good "
            "the clips are."
        ]
        if judge is None:
            notes.append("What the choice is worth another score has to say: --judged-by.")
        elif judge.benchmark == by.benchmark:
            notes.append(
                f"Both scores are {by.benchmark}'s, so {judge.column} is not independent of the "
                "choice, and its curve may be optimistic too."
            )
        notes.append("A still clip can win. Read motion beside every score.")
        notes += dict.fromkeys(each.about for each in (by, judge) if each and each.about)
        if self.captions == 1:
            notes.append("All prompts are of one caption, so the intervals have no width.")
        if self.tied:
            notes.append(
                f"In {self.tied} of {len(self.chosen)} prompts several clips have the best score. "
                "Curves are of the mean over them; the folder has the one whose digest is smallest."
            )
        if self.repeated:
            notes.append(
                "Samples that are the same file as an earlier one of their prompt: "
                f"{self.repeated}. They count all the same. Were they made with other seeds?"
            )
        every: dict[str, Sequence[Any]] = {
            f"without {by.column}, not chosen from": self.not_scored,
            f"without {judge.column if judge else ''}, not in the curves": self.not_judged,
            f"with fewer than {self.most} clips, not in the curves": self.not_in_curves,
            "without any clip to choose": self.without_choice,
            "left over from prompts of before, not counted": self.left_over,
        }
        for what, left_out in every.items():
            if left_out:
                noun = "prompts" if left_out[0].k is None else "clips"
                more = ", ..." if len(left_out) > 3 else ""
                named = ", ".join(map(str, left_out[:3]))
                notes.append(f"{noun} {what}: {len(left_out)}, {named}{more}")
        return notes


def optimism(folder: Path, benchmark: str) -> str | None:
    """Say that a folder's clips were chosen by a benchmark's scores, if they were."""
    path = folder / SELECTION
    if path.is_file() and read_record(Selection, path).chosen_by.benchmark == benchmark:
        return (
            f"The clips of {short_name(folder)} were chosen by {benchmark}'s own scores: for them "
            "these numbers are optimistic."
        )
    return None
