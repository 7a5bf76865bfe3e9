"""Shares and means over scored clips, and paired differences between two sets of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from videorepa.artifacts.clips import Key
from videorepa.artifacts.scores import Comparison, Row, clip_key
from videorepa.errors import UserError
from videorepa.evaluation.statistics import (
    holm,
    mcnemar_exact,
    paired_bootstrap,
    sign_flip,
    wilson_of_clusters,
)


def subject(row: Row) -> str:
    """What a row's clip is of. Clips of one subject are alike, so they are one cluster.

    It is the caption that a benchmark asks about, whatever ids its clips have.
    """
    return row.get("asked") or row.get("caption") or row["prompt_id"]


def share(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The share of rows in which a flag is set.

    Its interval is Wilson's. Clips of one caption are alike, so they count as the number of clips
    of different captions that they are worth; see `wilson_of_clusters`.

    Returns:
        percent, or None without a valid row; its 95 % interval low and high, in percent; n, the
        number of valid rows; prompts, the number of captions that they are of; and invalid, the
        number of rows in which the flag is None.
    """
    clusters = _by_subject(rows, key)
    flags = [bool(flag) for cluster in clusters for flag in cluster]
    low, high = wilson_of_clusters(clusters)
    percent = 100.0 * sum(flags) / len(flags) if flags else None
    counts = _counts(rows, clusters)
    return {"percent": percent, "low": 100 * low, "high": 100 * high, **counts}


def mean(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The mean of a value over rows.

    Returns:
        mean and low and high, its 95 % bootstrap interval over captions, all None without a valid
        row; n, the number of valid rows; prompts, the number of captions that they are of; and
        invalid, the number of rows in which the value is None.
    """
    clusters = _by_subject(rows, key)
    values = [value for cluster in clusters for value in cluster]
    low, high = paired_bootstrap(clusters) if values else (None, None)
    value = float(np.mean(values)) if values else None
    counts = _counts(rows, clusters)
    return {"mean": value, "low": low, "high": high, **counts}


def sweep(rows: Sequence[Row], key: str, thresholds: Sequence[float]) -> dict[str, float]:
    """The percentage of valid rows in which a value reaches each threshold; {} without a row."""
    values = np.array([row[key] for row in rows if row[key] is not None], float)
    if not len(values):
        return {}
    return {f"{limit:g}": float(100.0 * (values >= limit).mean()) for limit in thresholds}


def _by_subject(rows: Sequence[Row], key: str) -> list[list[float]]:
    return _clustered((row, row[key]) for row in rows if row[key] is not None)


def _clustered(values: Iterable[tuple[Row, float]]) -> list[list[float]]:
    """The values of each subject. The draws of an interval follow their order, so it is not that of
    the rows."""
    clusters: dict[str, list[float]] = defaultdict(list)
    for row, value in values:
        clusters[subject(row)].append(value)
    return [clusters[name] for name in sorted(clusters)]


def _counts(rows: Sequence[Row], clusters: Sequence[Sequence[float]]) -> dict[str, int]:
    n = sum(map(len, clusters))
    return {"n": n, "prompts": len(clusters), "invalid": len(rows) - n}


class Pairs(NamedTuple):
    """The clips that two sets of rows have in common, by prompt and sample number.

    Attributes:
        pairs: A's and B's row of each clip.
        unpaired: Number of rows without a partner.
    """

    pairs: list[tuple[Row, Row]]
    unpaired: int

    @classmethod
    def of(cls, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> Pairs:
        """Pair A's rows with B's.

        Raises:
            UserError: The two have no clip in common, one has two rows for a clip, or a clip of
                one is of another caption than the clip of that name in the other.
        """
        a, b = rows_by_clip(rows_a), rows_by_clip(rows_b)
        both = sorted(a.keys() & b.keys())
        for clip in both:
            if subject(a[clip]) != subject(b[clip]):
                raise UserError(
                    f"The prompt {clip[0]!r} is {subject(b[clip])[:80]!r} in one of the two sets "
                    f"and {subject(a[clip])[:80]!r} in the other; a comparison needs the same "
                    "prompts. Generate both from the same list."
                )
        if not both:
            raise UserError(
                f"Found no clip in both of the two sets ({len(a)} and {len(b)} clips); a "
                "comparison needs the same prompts and sample numbers. Generate both with the "
                "same --seed."
            )
        return cls([(a[clip], b[clip]) for clip in both], len(a) + len(b) - 2 * len(both))

    def compare(self, flags: Sequence[str], means: Sequence[str] = ()) -> dict[str, Any]:
        """The result of a benchmark's `compare`. A key without a valid pair is left out.

        Args:
            flags: Keys to compare with `flag`.
            means: Keys to compare with `mean`.
        """
        differences = {key: self.flag(key) for key in flags if self._valid(key)}
        differences |= {key: self.mean(key) for key in means if self._valid(key)}
        return differences | {"unpaired": self.unpaired}

    def flag(self, key: str) -> dict[str, Any]:
        """B minus A for a flag.

        McNemar's test assumes independent pairs, so it is done for each sample number alone, and p
        is the smallest of those p-values after Holm's adjustment. Where a sample number has several
        clips of a caption, p is that of flipping the signs of whole captions; see `sign_flip`.

        Returns:
            The values that `mean` returns, in percentage points; only_a and only_b, the numbers of
            pairs in which the flag is set on that side alone; and p.
        """
        valid = self._valid(key)
        discordant: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for a, b in valid:
            discordant[a["k"]][0] += bool(a[key]) and not b[key]
            discordant[a["k"]][1] += bool(b[key]) and not a[key]
        if len({(subject(a), a["k"]) for a, _ in valid}) == len(valid):
            p = min(holm([mcnemar_exact(*pair) for pair in discordant.values()]))
        else:
            p = sign_flip(self._clusters(key, 100.0))
        return self._difference(key, 100.0) | {
            "only_a": sum(only_a for only_a, _ in discordant.values()),
            "only_b": sum(only_b for _, only_b in discordant.values()),
            "p": p,
        }

    def mean(self, key: str) -> dict[str, Any]:
        """B minus A for a value.

        Returns:
            difference; low and high, its 95 % bootstrap interval over captions; n, the number of
            valid pairs; prompts, the number of captions that they are of; and invalid, the number
            of pairs in which either value is None.
        """
        return self._difference(key, 1.0)

    def tested(self, key: str, unit: float = 1.0) -> dict[str, Any]:
        """B minus A for a value, with a test.

        Args:
            key: The value's name in the rows.
            unit: What the differences are multiplied by.

        Returns:
            What `mean` returns; and p, that of flipping the signs of whole captions' differences.
        """
        return self._difference(key, unit) | {"p": sign_flip(self._clusters(key, unit))}

    def _valid(self, key: str) -> list[tuple[Row, Row]]:
        return [(a, b) for a, b in self.pairs if a[key] is not None and b[key] is not None]

    def _clusters(self, key: str, unit: float) -> list[list[float]]:
        """The differences of the pairs of each caption."""
        return _clustered((a, unit * (float(b[key]) - float(a[key]))) for a, b in self._valid(key))

    def _difference(self, key: str, unit: float) -> dict[str, Any]:
        clusters = self._clusters(key, unit)
        low, high = paired_bootstrap(clusters)
        n = sum(map(len, clusters))
        counts = {"n": n, "prompts": len(clusters), "invalid": len(self.pairs) - n}
        return {"difference": sum(map(sum, clusters)) / n, "low": low, "high": high, **counts}


def rows_by_clip(rows: Sequence[Row]) -> dict[Key, Row]:
    """Rows by their clip. Raises UserError if a clip has two."""
    clips = {clip_key(row): row for row in rows}
    if len(clips) < len(rows):
        raise UserError(
            f"Found {len(rows)} rows for {len(clips)} clips; expected one row for each prompt id "
            "and k. Remove the duplicates."
        )
    return clips


def adjust(comparison: Comparison) -> None:
    """Set every `p_holm` of a comparison. All its differences are one family of tests."""
    tested = comparison.tested
    for one, p in zip(tested, holm([one.p for one in tested if one.p is not None]), strict=True):
        one.p_holm = p


def compared(
    compare: Callable[[list[Row], list[Row]], dict[str, Any]],
    against: str,
    rows_a: list[Row],
    rows_b: list[Row],
) -> Comparison:
    """Compare two models over all their clips and over those of each scenario, as one family.

    Args:
        compare: Gives the differences, B minus A, by metric, and "unpaired".
        against: The name of A.
        rows_a: The rows of the model to compare with.
        rows_b: The rows of the model that is compared.
    """
    metrics = compare(rows_a, rows_b)
    unpaired = metrics.pop("unpaired")
    theirs = by_scenario(rows_a)
    of_scenarios = {}
    for name, rows in by_scenario(rows_b).items():
        clips = set(map(clip_key, rows))
        if any(clip_key(row) in clips for row in theirs.get(name, ())):
            of_scenarios[name] = compare(theirs[name], rows)
            del of_scenarios[name]["unpaired"]
    comparison = Comparison.model_validate(
        {
            "against": against,
            "unpaired": unpaired,
            "metrics": metrics,
            "by_scenario": of_scenarios,
        }
    )
    adjust(comparison)
    return comparison


def by_scenario(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The rows of each scenario, in alphabetical order, without those that have none."""
    grouped: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["scenario"]:
            grouped[row["scenario"]].append(row)
    return dict(sorted(grouped.items()))
