"""Shares and means over scored clips, and paired differences between two sets of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from videorepa.artifacts.scores import Comparison, Row
from videorepa.errors import UserError
from videorepa.evaluation.statistics import (
    holm,
    mcnemar_exact,
    paired_bootstrap,
    two_shares,
    wilson,
)


def share(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """How many rows have the flag `key`: percent, its interval low and high in percent, n, and how
    many more rows are invalid, in which it is None. With no valid row percent is None.

    The interval is Wilson's with one sample a prompt. With several it is a bootstrap over prompts,
    since a prompt's clips are alike.
    """
    clusters = _by_prompt(rows, key)
    flags = [bool(flag) for cluster in clusters for flag in cluster]
    if len(flags) == len(clusters):
        low, high = wilson(sum(flags), len(flags))
    else:
        low, high = paired_bootstrap(clusters)
    percent = 100.0 * sum(flags) / len(flags) if flags else None
    counts = {"n": len(flags), "invalid": len(rows) - len(flags)}
    return {"percent": percent, "low": 100 * low, "high": 100 * high, **counts}


def mean(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The mean of `key`, its bootstrap over prompts low and high, n, and how many more rows are
    invalid, in which it is None. With no valid row all three are None."""
    clusters = _by_prompt(rows, key)
    values = [value for cluster in clusters for value in cluster]
    low, high = paired_bootstrap(clusters) if values else (None, None)
    value = float(np.mean(values)) if values else None
    counts = {"n": len(values), "invalid": len(rows) - len(values)}
    return {"mean": value, "low": low, "high": high, **counts}


def sweep(rows: Sequence[Row], key: str, thresholds: Sequence[float]) -> dict[str, float]:
    """The percentage of valid rows in which `key` reaches each threshold; {} with none."""
    values = np.array([row[key] for row in rows if row[key] is not None], float)
    if not len(values):
        return {}
    return {f"{limit:g}": float(100.0 * (values >= limit).mean()) for limit in thresholds}


def _by_prompt(rows: Sequence[Row], key: str) -> list[list[float]]:
    clusters: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        if row[key] is not None:
            clusters[row["prompt_id"]].append(row[key])
    return list(clusters.values())


class Pairs(NamedTuple):
    """Clips that two sets of rows both have: same prompt, same k. unpaired: rows left out."""

    pairs: list[tuple[Row, Row]]
    unpaired: int

    @classmethod
    def of(cls, rows_a: Sequence[Row], rows_b: Sequence[Row]) -> Pairs:
        """Raises UserError if no clip is in both or a row is double."""
        a, b = _by_clip(rows_a), _by_clip(rows_b)
        both = sorted(a.keys() & b.keys())
        if not both:
            raise UserError(
                f"Found no clip in both of the two sets ({len(a)} and {len(b)} clips); a "
                "comparison needs the same prompts and sample numbers. Generate both with the "
                "same --seed."
            )
        return cls([(a[clip], b[clip]) for clip in both], len(a) + len(b) - 2 * len(both))

    def compare(self, flags: Sequence[str], means: Sequence[str] = ()) -> dict[str, Any]:
        """What a benchmark's `compare` gives. A key without a valid pair is left out."""
        found = {key: self.flag(key) for key in flags if self._valid(key)}
        found |= {key: self.mean(key) for key in means if self._valid(key)}
        return found | {"unpaired": self.unpaired}

    def flag(self, key: str) -> dict[str, Any]:
        """B minus A for a flag.

        difference in percentage points; low and high of its bootstrap over prompts; n pairs, of so
        many prompts, and how many more are invalid; only_a and only_b, pairs in which one side
        alone has the flag; p, McNemar's exact p-value. That test wants independent pairs, so it is
        done for each k alone, and p is the smallest of those after Holm's adjustment. p_unpaired is
        that of the z test which published tables, without their rows, leave one: for the record.
        """
        valid = self._valid(key)
        discordant: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for a, b in valid:
            discordant[a["k"]][0] += bool(a[key]) and not b[key]
            discordant[a["k"]][1] += bool(b[key]) and not a[key]
        alone = two_shares(
            sum(bool(a[key]) for a, _ in valid),
            len(valid),
            sum(bool(b[key]) for _, b in valid),
            len(valid),
        )
        return self._difference(key, 100.0) | {
            "only_a": sum(only_a for only_a, _ in discordant.values()),
            "only_b": sum(only_b for _, only_b in discordant.values()),
            "p": min(holm([mcnemar_exact(*pair) for pair in discordant.values()])),
            "p_unpaired": alone.p,
        }

    def mean(self, key: str) -> dict[str, Any]:
        """B minus A for a value: difference, low and high of its bootstrap over prompts, n,
        prompts, invalid."""
        return self._difference(key, 1.0)

    def _valid(self, key: str) -> list[tuple[Row, Row]]:
        return [(a, b) for a, b in self.pairs if a[key] is not None and b[key] is not None]

    def _difference(self, key: str, unit: float) -> dict[str, Any]:
        valid = self._valid(key)
        clusters: dict[str, list[float]] = defaultdict(list)
        for a, b in valid:
            clusters[a["prompt_id"]].append(unit * (float(b[key]) - float(a[key])))
        low, high = paired_bootstrap(list(clusters.values()))
        difference = sum(map(sum, clusters.values())) / len(valid)
        invalid = len(self.pairs) - len(valid)
        counts = {"n": len(valid), "prompts": len(clusters), "invalid": invalid}
        return {"difference": difference, "low": low, "high": high, **counts}


def compare_flags(
    rows_a: Sequence[Row], rows_b: Sequence[Row], keys: Sequence[str]
) -> dict[str, Any]:
    """`Pairs.compare` of flags alone. Raises UserError as `Pairs.of` does."""
    return Pairs.of(rows_a, rows_b).compare(keys)


def _by_clip(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    clips = {(row["prompt_id"], row["k"]): row for row in rows}
    if len(clips) < len(rows):
        raise UserError(
            f"Found {len(rows)} rows for {len(clips)} clips; expected one row for each prompt id "
            "and k. Remove the doubles."
        )
    return clips


def adjust(comparison: Comparison) -> None:
    """Set every `p_holm` of a comparison. All its differences are one family of tests."""
    tested = comparison.tested
    for one, p in zip(tested, holm([one.p for one in tested if one.p is not None]), strict=True):
        one.p_holm = p
