"""Measures how well a judge's scores agree with people's ratings of the same clips."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import Field

from videorepa.artifacts.clips import Key, clip_path
from videorepa.artifacts.reading import leaves
from videorepa.artifacts.scores import Row, Scores, Summary, clip_key, score_folder
from videorepa.errors import UserError
from videorepa.evaluation.human_ratings import (
    HumanRating,
    HumanRatings,
    clip_names,
    read_human_ratings,
)
from videorepa.evaluation.pairs import by_scenario, compared, rows_by_clip, subject
from videorepa.evaluation.rank_agreement import CHANCE, RankAgreement, difference, interval
from videorepa.settings.section import Section
from videorepa.system.files import short_name
from videorepa.system.progress import console
from videorepa.system.wording import count

BENCHMARK, VERSION = "agreement", "1"

NAMES = ("{}_expected", "{}_score", "{}_rating", "{}")
"""Where a judge's score of a dimension is looked for, the finest first."""

TWO_VALUES, GRADED = "two values", "graded"

SHOWN_NAMES = 3
"""Most names that a message lists."""

PLACES = {"a rater": "value", "in a rater's place": "score"}
"""Who is compared with the mean of a clip's other raters, and what of a row is theirs."""

ABOUT = (
    "How well the scores of {judge} agree with people's ratings. “auc” is the probability that the "
    "better of two clips scores higher, and “same caption” that of two clips of one caption: 0.5 "
    "is chance, and what a judge has that reads the caption alone. “spearman” and “kendall” "
    "(tau-b) are rank correlations. “a rater” is one person against the mean of a clip's others, "
    "“in a rater's place” the judge against the same means. Intervals draw whole captions."
)


class Measure(NamedTuple):
    """A metric before it is computed.

    Attributes:
        ranks: Whose ranks are compared.
        statistic: One of `CHANCE`.
    """

    dimension: str
    ranks: RankAgreement
    statistic: str


class AgreementSettings(Section):
    """How scores and ratings are compared.

    Attributes:
        threshold: The rating from which a clip is good, for an AUC of ratings on a longer scale
            than two values.
        column: The column of the scores; `{}` stands for the dimension. By default the first of
            DIMENSION_expected, DIMENSION_score, DIMENSION_rating and DIMENSION.
    """

    threshold: float | None = Field(default=None)
    column: str = ""

    def find(self, rows: Sequence[Row], dimension: str, law: str | None) -> str | None:
        """The column that holds the judge's scores, or None if there is none.

        A judge that scores a law by itself, of any clip, is asked for that, and otherwise for the
        dimension.
        """
        numbers = {
            name for row in rows for name, v in leaves(row) if isinstance(v, int | float | None)
        }
        patterns = [self.column] if self.column else NAMES
        names = [of for of in (law, dimension) if of]
        columns = [pattern.replace("{}", name) for name in names for pattern in patterns]
        return next((column for column in columns if column in numbers), None)


def agreement(
    videos: Path,
    ratings: Sequence[Path],
    out: Path | None = None,
    *,
    against: Path | None = None,
    settings: Sequence[str] = (),
) -> Scores:
    """Compare a judge's scores with people's ratings.

    A clip's rating is the mean over its raters. For ratings of two values there is an AUC, for
    others Spearman's and Kendall's correlation. A clip that is not rated, a rating whose clip is
    not scored, and a clip without a valid score are counted and left out.

    Args:
        videos: Folder or list of clips that `evaluate` has scored, or the folder of the scores.
        ratings: Files of ratings; see `read_human_ratings`.
        out: Folder of the result; by default NAME-agreement beside the scores.
        against: Scores of the same clips by another judge, to compare with.
        settings: Keys of `AgreementSettings`, each `key=value`.

    Raises:
        UserError: There are no scores or ratings, none are of the same clips, a rating fits two
            clips, or a clip has two scores.
    """
    how = AgreementSettings.from_settings(settings, "the benchmark agreement")
    judge = _scores(videos)
    people = read_human_ratings(ratings)
    out = out or judge.folder.with_name(f"{judge.folder.name}-agreement")
    matched = _Matched(judge, people)
    rows = matched.rows(how)
    measured = aggregate(rows)
    summary = Summary.model_validate(
        {
            # A table for each judge.
            "benchmark": f"{BENCHMARK} of {judge.summary.benchmark}",
            "version": VERSION,
            "about": ABOUT.format(judge=judge.summary.benchmark),
            "judge": f"{judge.summary.benchmark} {judge.summary.version}",
            "judge_rows": judge.digest,
            "ratings": [str(path) for path in ratings],
            "empty_ratings": people.empty,
            "settings": how.model_dump(),
            "n": len({clip_key(row) for row in rows}),
            "metrics": measured,
            "by_scenario": {law: aggregate(of) for law, of in by_scenario(rows).items()},
            "missing": matched.without_score,
            "left_over": matched.without_rating,
        }
    )
    scores = Scores(out, summary, rows)
    if against is not None:
        other = _scores(against)
        theirs = _Matched(other, people, quiet=True).rows(how)
        _check_same_clips(theirs, rows, other.folder)
        comparison = compared(compare, short_name(against), theirs, rows)
        scores = scores.with_comparison(comparison, other.folder, other.digest)
    out.mkdir(parents=True, exist_ok=True)
    scores.write()
    return scores


def aggregate(rows: Sequence[Row]) -> dict[str, dict[str, Any]]:
    """How well scores and ratings agree, over all dimensions or, of a law's rows, over those.

    Returns:
        By "DIMENSION STATISTIC" the value as "mean", None where it has none, its interval low and
        high, n, prompts; invalid, the number of rated clips without a valid score; and split, of
        those of which as many raters say 0 as 1, which are left out too.
    """
    metrics = {}
    for name, (dimension, ranks, statistic) in (_measures(rows) | _of_raters(rows)).items():
        value = ranks.value(statistic)
        low, high = interval(ranks.drawn(statistic))
        of = [row for row in _whole(rows) if row["dimension"] == dimension]
        metrics[name] = {
            "mean": value if math.isfinite(value) else None,
            "low": low,
            "high": high,
            "n": ranks.clips,
            "prompts": ranks.captions,
            "invalid": sum(row["score"] is None for row in of),
            "split": sum(row["scale"] == TWO_VALUES and _is_good(row) is None for row in of),
        }
        if high is not None and high < CHANCE[statistic]:
            console.print(
                f"warning: {name} is {value:.3f}, below chance: higher scores go with lower "
                "ratings. That is right only for a score of which less is better; otherwise the "
                "ratings or the scores are the wrong way round.",
                style="yellow",
            )
    return metrics


def compare(rows_a: Sequence[Row], rows_b: Sequence[Row]) -> dict[str, Any]:
    """B's agreement less A's, over the ratings for which both judges have a valid score."""
    a, b = ({_unit(row): row for row in rows if _is_valid(row)} for rows in (rows_a, rows_b))
    both = sorted(a.keys() & b.keys(), key=str)
    ours = _measures([b[unit] for unit in both])
    # The same captions, and so the same samples of the bootstrap.
    named = [a[unit] | {key: b[unit].get(key) for key in ("asked", "caption")} for unit in both]
    theirs = _measures(named)
    differences = {
        name: result
        for name, (_, ranks, statistic) in ours.items()
        if name in theirs and (result := difference(theirs[name].ranks, ranks, statistic))
    }
    return differences | {"unpaired": len(rows_a) + len(rows_b) - 2 * len(both)}


def _measures(rows: Sequence[Row]) -> dict[str, Measure]:
    """What is measured of the judge, over the rows that have a score."""
    measures: dict[str, Measure] = {}
    for dimension, of in _by_dimension(rows).items():
        measures |= _of_ratings(dimension, of, "score", "")
    return measures


def _of_raters(rows: Sequence[Row]) -> dict[str, Measure]:
    """What is measured of single raters, and of the judge in their place."""
    measures: dict[str, Measure] = {}
    for dimension, of in _by_dimension(rows).items():
        several = [row | one for row in of for one in _left_out(row)]
        for who, column in PLACES.items():
            if several:
                measures |= _of_ratings(dimension, several, column, f", {who}")
    return measures


def _by_dimension(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows with a score, by dimension."""
    by_dimension: dict[str, list[Row]] = defaultdict(list)
    for row in _whole(rows):
        of = by_dimension[row["dimension"]]
        if _is_valid(row):
            of.append(row)
    return by_dimension


def _of_ratings(dimension: str, rows: Sequence[Row], column: str, who: str) -> dict[str, Measure]:
    """The measures of a dimension. Of `who`, if it is not the judge, there is but the first."""
    measures: dict[str, Measure] = {}

    def add(rows: Sequence[Row], ratings: Sequence[float], *statistics: str) -> None:
        captions = [subject(row) for row in rows]
        ranks = RankAgreement([row[column] for row in rows], ratings, captions)
        for statistic in statistics[:1] if who else statistics:
            measures[f"{dimension} {statistic}{who}"] = Measure(dimension, ranks, statistic)

    binary = all(row["scale"] == TWO_VALUES for row in rows)
    if not binary:
        add(rows, [row["rating"] for row in rows], "spearman", "kendall", "same caption")
    sure = [(row, good) for row in rows if (good := _is_good(row)) is not None]
    if binary or sure:
        statistics = ("auc", "same caption") if binary else ("auc",)
        add([row for row, _ in sure], [float(good) for _, good in sure], *statistics)
    return measures


def _is_good(row: Row) -> bool | None:
    """Whether people call the clip good; None if they are split, or the threshold is not stated."""
    if row["scale"] == TWO_VALUES:
        return None if row["rating"] == 0.5 else row["rating"] > 0.5
    return None if row["threshold"] is None else row["rating"] >= row["threshold"]


def _left_out(row: Row) -> Iterator[dict[str, float]]:
    """For each of several raters, their rating and the mean of the others'."""
    raters = row["raters"]
    if len(raters) > 1:
        for rater, value in raters.items():
            others = [other for name, other in raters.items() if name != rater]
            yield {"value": value, "rating": _mean(others)}


def _whole(rows: Sequence[Row]) -> list[Row]:
    """The rows of whole dimensions; those of laws if there are no others."""
    return [row for row in rows if row["scenario"] is None] or list(rows)


def _is_valid(row: Row) -> bool:
    return row["score"] is not None


def _unit(row: Row) -> tuple[Any, ...]:
    return (*clip_key(row), row["dimension"], row["scenario"])


def _finite(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _mean(values: Sequence[float]) -> float:
    # Rounded, so that means of the same ratings in another order are ties.
    return round(math.fsum(values) / len(values), 9)


def _scores(videos: Path) -> Scores:
    is_scores = (videos / "scores.jsonl").is_file()
    return Scores.read(videos if is_scores else score_folder(videos))


class _Matched:
    """The scores of clips and the ratings of the same clips.

    Attributes:
        without_score: The rated clips that are not scored.
        without_rating: The scored clips that nobody rated.
    """

    def __init__(self, judge: Scores, people: HumanRatings, quiet: bool = False) -> None:
        self._by_clip = rows_by_clip(judge.rows)
        self._judge = judge
        self._ratings: dict[Key, list[HumanRating]] = defaultdict(list)
        find, names = _finder(judge), {}
        unscored: dict[str, dict[str, Any]] = {}
        for rating in people.ratings:
            name = "/".join(rating.clip)
            key = find(rating)
            if key is None:
                unscored[f"{name} {rating.k}"] = {"prompt_id": name, "k": rating.k, "prompt": ""}
                continue
            other = names.setdefault(key, rating.clip)
            if other != rating.clip:
                raise UserError(
                    f"The scored clip {key[0]!r} fits the ratings of {'/'.join(other)} and of "
                    f"{name}. Give clips of different models ids with the model's name, such as "
                    f"{name}, and score them again."
                )
            self._ratings[key].append(rating)
        self.without_score = list(unscored.values())
        self.without_rating = [
            {"prompt_id": row["prompt_id"], "k": row["k"], "prompt": row.get("caption", "")}
            for row in judge.rows
            if clip_key(row) not in self._ratings
        ]
        if not self._ratings:
            rated = ", ".join("/".join(r.clip) for r in people.ratings[:SHOWN_NAMES])
            scored = ", ".join(row["prompt_id"] for row in judge.rows[:SHOWN_NAMES])
            raise UserError(
                f"None of the ratings is of a clip in {judge.folder}. The first are of {rated}; "
                f"the first scores of {scored}. A clip's id has to be its file's name in the "
                "ratings, or end in it."
            )
        for what, clips in (
            ("rated and not scored", self.without_score),
            ("scored and not rated", self.without_rating),
        ):
            if clips and not quiet:
                first = ", ".join(f"{c['prompt_id']} {c['k']}" for c in clips[:SHOWN_NAMES])
                console.print(f"{count(len(clips), 'clip')} {what}, and left out; first: {first}")

    def rows(self, how: AgreementSettings) -> list[Row]:
        """A row for each clip and dimension, or law, that people rated and the judge may score.

        Raises:
            UserError: The judge has no score of any dimension.
        """
        rows = []
        grouped: dict[tuple[str, str | None], dict[Key, list[HumanRating]]] = {}
        for key, ratings in self._ratings.items():
            for one in ratings:
                of = grouped.setdefault((one.dimension, one.law), {})
                of.setdefault(key, []).append(one)
        # A clip's last row is of a whole dimension: a report shows that one beside the clip.
        for (dimension, law), of in sorted(grouped.items(), key=lambda item: item[0][1] is None):
            values = [rating.value for ratings in of.values() for rating in ratings]
            scale = TWO_VALUES if set(values) <= {0, 1} else GRADED
            column = how.find(self._judge.rows, dimension, law)
            if column is None:
                continue
            for key, ratings in of.items():
                scored = self._by_clip[key]
                rows.append(
                    {name: scored[name] for name in ("clip", "caption", "asked") if name in scored}
                    | {
                        "prompt_id": key[0],
                        "k": key[1],
                        "scenario": law,
                        "benchmark": f"{BENCHMARK} {VERSION}",
                        "judge": self._judge.summary.benchmark,
                        "dimension": dimension,
                        "column": column,
                        "score": _finite(dict(leaves(scored)).get(column)),
                        "rating": _mean([rating.value for rating in ratings]),
                        "raters": {rating.rater: rating.value for rating in ratings},
                        "sources": [rating.source for rating in ratings],
                        "scale": scale,
                        "threshold": how.threshold,
                    }
                )
        if not rows:
            columns = [n for n, v in leaves(self._judge.rows[0]) if isinstance(v, int | float)]
            dimensions = sorted({law or dimension for dimension, law in grouped})
            raise UserError(
                f"{self._judge.folder} has no score of what people rated ({', '.join(dimensions)})"
                f"; it has {', '.join(columns) or 'no numbers'}. Name one: --set column=NAME."
            )
        return rows


def _finder(judge: Scores) -> Callable[[HumanRating], Key | None]:
    """A function that finds the scored clip that a rating is of, by its name or its digest."""
    by_name: dict[tuple[str, int], list[tuple[tuple[str, ...], Key]]] = defaultdict(list)
    for row in judge.rows:
        key = clip_key(row)
        file = clip_path(Path(), *key).stem
        names = {(clip_names(key[0]), key[1]), ((file,), 0)}
        if "clip" in row:
            names.add(((row["clip"],), 0))
        for name, k in names:
            by_name[name[-1], k].append((name, key))

    def find(rating: HumanRating) -> Key | None:
        fitting = set()
        for name, key in by_name[rating.clip[-1], rating.k]:
            length = min(len(name), len(rating.clip))
            if name[-length:] == rating.clip[-length:]:
                fitting.add(key)
        if len(fitting) > 1:
            raise UserError(
                f"{rating.source}: {'/'.join(rating.clip)} fits {len(fitting)} scored clips, "
                f"{' and '.join(sorted(key[0] for key in fitting)[:2])}. Name it by its digest, "
                "the column clip of scores.jsonl, or by its id."
            )
        return fitting.pop() if fitting else None

    return find


def _check_same_clips(theirs: Sequence[Row], ours: Sequence[Row], folder: Path) -> None:
    digests = {clip_key(row): row.get("clip") for row in theirs}
    if not digests.keys() & {clip_key(row) for row in ours}:
        raise UserError(
            f"No rated clip is scored in {folder} too. Both judges have to score the same videos."
        )
    for row in ours:
        other = digests.get(clip_key(row), row.get("clip"))
        if other != row.get("clip"):
            raise UserError(
                f"The clip {row['prompt_id']!r} {row['k']} is another video in {folder} ({other}, "
                f"not {row.get('clip')}). Both judges have to score the same videos."
            )
