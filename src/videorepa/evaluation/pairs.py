"""Shares and means over scored clips, and paired differences between two sets of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from videorepa.artifacts.scores import Comparison, Row
from videorepa.errors import UserError
from videorepa.evaluation.statistics import holm, mcnemar_exact, paired_bootstrap, wilson


def share(rows: Sequence[Row], key: str) -> dict[str, Any]:
    """The share of rows in which a flag is set.

    Its interval is Wilson's if each prompt has one sample. With several it is a bootstrap over
    prompts, since a prompt's clips are alike.

    Returns:
        percent, which is None without a valid row; low and high, its 95 % interval in percent; n,
        the number of valid rows; and invalid, the number of rows in which the flag is None.
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
    """The mean of a value over rows.

    Returns:
        mean, and low and high, its 95 % bootstrap interval over prompts, all None without a valid
        row; n, the number of valid rows; and invalid, the number of rows in which the value is
        None.
    """
    clusters = _by_prompt(rows, key)
    values = [value for cluster in clusters for value in cluster]
    low, high = paired_bootstrap(clusters) if values else (None, None)
    value = float(np.mean(values)) if values else None
    counts = {"n": len(values), "invalid": len(rows) - len(values)}
    return {"mean": value, "low": low, "high": high, **counts}


def sweep(rows: Sequence[Row], key: str, thresholds: Sequence[float]) -> dict[str, float]:
    """The percentage of valid rows in which a value reaches each threshold; {} without a row."""
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
            UserError: The two have no clip in common, or one has two rows for a clip.
        """
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

        McNemar's test assumes independent pairs, so each sample number has a test of its own, and p
        is the smallest of their p-values after Holm's adjustment.

        Returns:
            The values that `mean` returns, in percentage points; only_a and only_b, the numbers of
            pairs in which the flag is set on that side alone; and p.
        """
        discordant: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for a, b in self._valid(key):
            discordant[a["k"]][0] += bool(a[key]) and not b[key]
            discordant[a["k"]][1] += bool(b[key]) and not a[key]
        return self._difference(key, 100.0) | {
            "only_a": sum(only_a for only_a, _ in discordant.values()),
            "only_b": sum(only_b for _, only_b in discordant.values()),
            "p": min(holm([mcnemar_exact(*pair) for pair in discordant.values()])),
        }

    def mean(self, key: str) -> dict[str, Any]:
        """B minus A for a value.

        Returns:
            difference; low and high, its 95 % bootstrap interval over prompts; n, the number of
            valid pairs; prompts, the number of their prompts; and invalid, the number of pairs in
            which either value is None.
        """
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


def _by_clip(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    clips = {(row["prompt_id"], row["k"]): row for row in rows}
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
