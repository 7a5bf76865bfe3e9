"""Counts blind ratings, saved by a report's page, of which of two clips of a prompt is better."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from videorepa.artifacts.clips import Key, clip_digest, readable_clips
from videorepa.artifacts.reading import first_fault
from videorepa.artifacts.scores import Comparison, Row, Scores, Summary, score_folder
from videorepa.errors import UserError
from videorepa.evaluation.pairs import adjust, subject
from videorepa.evaluation.statistics import mcnemar_exact, paired_bootstrap, wilson
from videorepa.system.files import read_bytes, short_name
from videorepa.system.wording import count

FORMAT = "videorepa ratings 1"

VERSION = "1"

QUESTIONS = {
    "pc": "Which clip obeys the laws of physics better?",
    "sa": "Which clip shows better what the prompt says?",
}


class Rating(BaseModel):
    """One answer.

    Attributes:
        question: One of `QUESTIONS`.
        left: Digest of the left clip, which does not reveal its model.
        right: Digest of the right clip.
        preferred: The better clip's side, or "same".
        seconds: Time until the answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: str
    k: int
    question: Literal["pc", "sa"]
    left: str
    right: str
    preferred: Literal["left", "right", "same"]
    seconds: float


class Ratings(BaseModel):
    """One rater's answers, as the page saves them in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["videorepa ratings 1"]
    rater: str
    ratings: list[Rating]

    @classmethod
    def read(cls, path: Path) -> Ratings:
        """Read a file. Raises UserError if it is missing or holds something else."""
        try:
            return cls.model_validate_json(read_bytes(path))
        except FileNotFoundError:
            raise UserError(f"There is no {path}. A report's page saves such files.") from None
        except ValidationError as error:
            raise UserError(
                f"{path} is not a file of ratings ({first_fault(error)}). Expected a file that a "
                "report's page saved, unchanged."
            ) from None


def rated(videos: Path, against: Path, ratings: Sequence[Path], out: Path | None = None) -> Scores:
    """Measure how often raters prefer clips to another model's clips of the same prompts.

    A prompt counts once, however many raters, samples and ids it has: for the side that more of its
    ratings prefer, or as even. The metric is, for each question, the share of prompts won among
    those that are not even, with Wilson's interval. The difference is prompts won minus prompts
    lost, in percent of all prompts, with its bootstrap over prompts and the exact binomial p-value
    of won against lost.

    Args:
        videos: Folder or list of the clips.
        against: Folder or list of the other model's clips.
        ratings: Files that a report's page saved, one per rater. A rating names its clips by their
            content. Ratings of other clips are left out and counted.
        out: Folder of the scores; by default `rated` in the clips' folder, or NAME.rated beside
            their list.

    Raises:
        UserError: No rating is of these clips, or a rater has rated a pair twice.
    """
    if not ratings:
        raise UserError("There are no ratings. Give files that a report's page saved.")
    out = out or score_folder(videos, "rated")
    captions = {key: clip.caption for key, clip in readable_clips(videos).items()}
    ours, theirs = _digests(videos), _digests(against)
    rows: list[Row] = []
    rated_in: dict[tuple[Any, ...], Path] = {}
    others = 0
    for path in ratings:
        file = Ratings.read(path)
        for rating in file.ratings:
            row = _row(rating, ours, theirs)
            if row is None:
                others += 1
                continue
            key = (file.rater, rating.question, rating.prompt_id, rating.k)
            if key in rated_in:
                raise UserError(
                    f"{file.rater!r} has rated prompt {rating.prompt_id!r}, sample {rating.k}, "
                    f"twice (in {rated_in[key]} and {path}). Give only the last file of each rater."
                )
            rated_in[key] = path
            caption = captions[rating.prompt_id, rating.k]
            rows.append(row | {"rater": file.rater, "file": path.name, "caption": caption})
    if not rows:
        raise UserError(
            f"None of the {others} ratings are of clips in {videos} and {against}. A rating is "
            "only valid for the files that the rater saw: were the clips generated again since?"
        )
    out.mkdir(parents=True, exist_ok=True)
    metrics, differences = _metrics(rows)
    raters = len({row["rater"] for row in rows})
    summary = Summary(
        benchmark="rated",
        version=VERSION,
        about="The share of prompts on which blind raters prefer this model's clip to that of "
        f"{short_name(against)}, of those on which they prefer either; n counts those prompts. "
        f"{count(len(rows), 'rating')} by {count(raters, 'rater')}.",
        n=len(rows),
        metrics=metrics,
        by_scenario={},
        failures=[],
        missing=[],
    )
    comparison = Comparison(
        against=short_name(against), unpaired=others, metrics=differences, by_scenario={}
    )
    adjust(comparison)
    scores = Scores(out, summary, rows).with_comparison(comparison, against)
    scores.write()
    return scores


def _digests(folder: Path) -> dict[Key, str]:
    return {key: clip_digest(clip.path) for key, clip in readable_clips(folder).items()}


def _row(rating: Rating, ours: dict[Key, str], theirs: dict[Key, str]) -> Row | None:
    """The rating as a row of our side's scores, or None if it is of other clips."""
    key = (rating.prompt_id, rating.k)
    for side, mine, other in (
        ("left", rating.left, rating.right),
        ("right", rating.right, rating.left),
    ):
        if ours.get(key) == mine and theirs.get(key) == other:
            preferred = None if rating.preferred == "same" else rating.preferred == side
            return {
                "prompt_id": rating.prompt_id,
                "k": rating.k,
                "scenario": None,
                "benchmark": f"rated {VERSION}",
                "question": rating.question,
                "preferred": preferred,
                "side": side,
                "clip": mine,
                "against": other,
                "seconds": rating.seconds,
            }
    return None


def _metrics(rows: Sequence[Row]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The shares of prompts won and the differences to the other side, each by metric."""
    shares, differences = {}, {}
    for question in QUESTIONS:
        balance: dict[str, int] = defaultdict(int)
        for row in rows:
            if row["question"] == question:
                balance[subject(row)] += {True: 1, False: -1, None: 0}[row["preferred"]]
        if not balance:
            continue
        won = sum(value > 0 for value in balance.values())
        lost = sum(value < 0 for value in balance.values())
        signs = [(value > 0) - (value < 0) for value in balance.values()]
        low, high = wilson(won, won + lost)
        percent = 100 * won / (won + lost) if won + lost else None
        name = f"{question} preferred"
        shares[name] = {
            "percent": percent,
            "low": 100 * low,
            "high": 100 * high,
            "n": won + lost,
            "even": len(balance) - won - lost,
        }
        low, high = paired_bootstrap([[100.0 * sign] for sign in signs])
        differences[name] = {
            "difference": 100.0 * (won - lost) / len(balance),
            "low": low,
            "high": high,
            "n": len(balance),
            "only_a": lost,
            "only_b": won,
            "p": mcnemar_exact(lost, won),
        }
    return shares, differences
