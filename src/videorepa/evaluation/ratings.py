"""Blind ratings, as a report's page saves them: which of two clips of a prompt is better."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from videorepa.artifacts.clips import Key, clip_digest, read_generation
from videorepa.artifacts.scores import Evaluation, result_folder
from videorepa.errors import UserError
from videorepa.evaluation.statistics import holm, mcnemar_exact, paired_bootstrap, wilson
from videorepa.system.files import atomic_write, short_name
from videorepa.system.wording import count

FORMAT = "videorepa ratings 1"

VERSION = "1"

QUESTIONS = {
    "pc": "Which clip obeys the laws of physics better?",
    "sa": "Which clip shows better what the prompt says?",
}

Row = dict[str, Any]


class Rating(BaseModel):
    """One answer. left, right: digests of the two clips, which say nothing of the models."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt_id: str
    k: int
    question: Literal["pc", "sa"]
    left: str
    right: str
    preferred: Literal["left", "right", "same"]
    seconds: float


class Ratings(BaseModel):
    """What one rater has answered: the file that the page saves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal["videorepa ratings 1"]
    rater: str
    ratings: list[Rating]

    @classmethod
    def read(cls, path: Path) -> Ratings:
        """Raises UserError if there is no such file, or it is something else."""
        try:
            return cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            raise UserError(f"There is no {path}. A report's page saves such files.") from None
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise UserError(
                f"{path} is not a file of ratings ({where}: {first['msg']}). Expected what a "
                "report's page saved, as it saved it."
            ) from None


def rated(
    videos: Path, against: Path, ratings: Sequence[Path], out: Path | None = None
) -> Evaluation:
    """How often raters prefer the clips in `videos` to those of the same prompts in `against`.

    ratings: files that a report's page saved, one for each rater. Clips are known by their content,
    so ratings of other clips are left out and counted. out: by default `rated` in `videos`;
    beside a list, NAME.rated.

    A prompt counts once, however many raters and samples it has: for the side that more of its
    ratings prefer, or as even. Per question: the share of the prompts that are not even, with
    Wilson's interval; and, as the difference, prompts won less prompts lost in percent of all,
    with its bootstrap over prompts and the exact binomial p-value of won against lost. Raises
    UserError if nothing in the files is of these clips, or a rater has rated a pair twice.
    """
    if not ratings:
        raise UserError("There are no ratings. Give files that a report's page saved.")
    out = out or result_folder(videos, "rated")
    ours, theirs = _digests(videos), _digests(against)
    rows: list[Row] = []
    found: dict[tuple[Any, ...], Path] = {}
    others = 0
    for path in ratings:
        file = Ratings.read(path)
        for rating in file.ratings:
            row = _row(rating, ours, theirs)
            if row is None:
                others += 1
                continue
            key = (file.rater, rating.question, rating.prompt_id, rating.k)
            if key in found:
                raise UserError(
                    f"{file.rater!r} has rated prompt {rating.prompt_id!r}, sample {rating.k}, "
                    f"twice (in {found[key]} and {path}). Give only the last file of each rater."
                )
            found[key] = path
            rows.append(row | {"rater": file.rater, "file": path.name})
    if not rows:
        raise UserError(
            f"None of the {others} ratings are of clips in {videos} and {against}. Ratings hold "
            "for the very files that were shown: were the clips generated again since?"
        )
    out.mkdir(parents=True, exist_ok=True)
    atomic_write(out / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    metrics, differences = _metrics(rows)
    raters = len({row["rater"] for row in rows})
    summary = {
        "benchmark": "rated",
        "version": VERSION,
        "about": "Of the prompts on which blind raters prefer one of two clips, the share on which "
        f"they prefer this model's to {short_name(against)}'s; n counts those prompts. "
        f"{count(len(rows), 'rating')} by {count(raters, 'rater')}.",
        "n": len(rows),
        "metrics": metrics,
        "by_scenario": {},
        "failures": [],
        "missing": [],
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1))
    comparison = {
        "against": short_name(against),
        "unpaired": others,
        "metrics": differences,
        "by_scenario": {},
    }
    atomic_write(out / "comparison.json", json.dumps(comparison, indent=1))
    return Evaluation(out, summary, comparison)


def _digests(folder: Path) -> dict[Key, str]:
    return {key: clip_digest(clip.path) for key, clip in read_generation(folder).items()}


def _row(rating: Rating, ours: dict[Key, str], theirs: dict[Key, str]) -> Row | None:
    """The rating as seen from our side, or None if it is of other clips."""
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
    shares, differences = {}, {}
    for question in QUESTIONS:
        balance: dict[str, int] = defaultdict(int)
        for row in rows:
            if row["question"] == question:
                balance[row["prompt_id"]] += {True: 1, False: -1, None: 0}[row["preferred"]]
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
    for found, p in zip(
        differences.values(), holm([found["p"] for found in differences.values()]), strict=True
    ):
        found["p_holm"] = p
    return shares, differences
