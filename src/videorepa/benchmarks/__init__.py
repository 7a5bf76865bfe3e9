"""Benchmarks: what to generate, how to score a clip, and how scores become a table.

A benchmark is a module of this package with a class `Benchmark` that fulfils the protocol below.
A row is what scoring one clip gave, with where it came from: a dict with "prompt_id", "k" (the
number of the sample for that prompt), "scenario" (or None) and all keys of the clip's score.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from videorepa.errors import UserError
from videorepa.statistics import holm, mcnemar_exact, paired_bootstrap, wilson

Row = dict[str, Any]


class Prompt(NamedTuple):
    """What a clip is to show; the id is unique within a benchmark and never changes."""

    id: str
    caption: str


class Benchmark(Protocol):
    """The contract. `version` changes whenever the same clip could get another score.

    aggregate: name of a metric -> {"percent" or "mean": its value, and what more is known of it,
        such as "low", "high" and "n"}. It is asked for all rows, and for each scenario's.
    compare: name of a metric -> {"difference": B minus A, "low", "high", "p", ...}, and
        "unpaired", the number of rows left out.
    """

    name: str
    version: str
    higher_is_better: bool

    def prompts(self, count: int, seed: int) -> list[Prompt]: ...

    def scenario(self, caption: str) -> str | None: ...

    def score(self, frames: np.ndarray, caption: str) -> dict[str, float | bool]: ...

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, float | int]]: ...

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]: ...


def share(rows: Sequence[Row], key: str) -> dict[str, float | int]:
    """How many rows have the flag `key`: percent, its Wilson interval low and high in percent, n.

    The interval takes clips for independent, so with several samples a prompt it is too narrow:
    the more alike a prompt's clips, the more. `compare` does not suffer from that.
    """
    successes = sum(bool(row[key]) for row in rows)
    low, high = wilson(successes, len(rows))
    percent = 100.0 * successes / len(rows) if rows else float("nan")
    return {"percent": percent, "low": 100 * low, "high": 100 * high, "n": len(rows)}


def compare_flags(
    rows_a: Sequence[Row], rows_b: Sequence[Row], keys: Sequence[str]
) -> dict[str, Any]:
    """B minus A for each flag, over the clips that both have: same prompt, same k.

    For every key: difference in percentage points; low and high of its bootstrap over prompts; n
    pairs; only_a and only_b, pairs in which one side alone has the flag; p, McNemar's exact
    p-value; p_holm, adjusted for there being several keys. McNemar's test wants independent
    pairs, so it is done for each k alone, and p is the smallest of those after Holm's adjustment.
    "unpaired" counts the rows left out. Raises UserError if no clip is in both or a row is double.
    """
    a, b = _by_clip(rows_a), _by_clip(rows_b)
    both = sorted(a.keys() & b.keys())
    if not both:
        raise UserError(
            f"Found no clip in both of the two sets ({len(a)} and {len(b)} clips); a comparison "
            "needs the same prompts and sample numbers. Generate both with the same --seed."
        )
    found: dict[str, Any] = {}
    for key in keys:
        clusters: dict[str, list[float]] = defaultdict(list)
        discordant: dict[int, list[int]] = defaultdict(lambda: [0, 0])
        for prompt_id, k in both:
            in_a, in_b = bool(a[prompt_id, k][key]), bool(b[prompt_id, k][key])
            clusters[prompt_id].append(100.0 * (in_b - in_a))
            discordant[k][0] += in_a and not in_b
            discordant[k][1] += in_b and not in_a
        low, high = paired_bootstrap(list(clusters.values()))
        found[key] = {
            "difference": sum(map(sum, clusters.values())) / len(both),
            "low": low,
            "high": high,
            "n": len(both),
            "only_a": sum(only_a for only_a, _ in discordant.values()),
            "only_b": sum(only_b for _, only_b in discordant.values()),
            "p": min(holm([mcnemar_exact(*pair) for pair in discordant.values()])),
        }
    for key, p in zip(keys, holm([found[key]["p"] for key in keys]), strict=True):
        found[key]["p_holm"] = p
    return found | {"unpaired": len(a) + len(b) - 2 * len(both)}


def _by_clip(rows: Sequence[Row]) -> dict[tuple[str, int], Row]:
    clips = {(row["prompt_id"], row["k"]): row for row in rows}
    if len(clips) < len(rows):
        raise UserError(
            f"Found {len(rows)} rows for {len(clips)} clips; expected one row for each prompt id "
            "and k. Remove the doubles."
        )
    return clips
