"""Intervals and tests for shares and paired differences: what a number in a table may claim."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from scipy import stats


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval for a share, as two fractions in [0, 1].

    Holds for n independent trials. Without trials nothing is known: (0, 1).
    Raises ValueError unless 0 <= successes <= n and 0 < confidence < 1.
    """
    return _interval(successes, n, confidence, "wilson")


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval for a share: never narrower than its confidence promises. Otherwise as
    `wilson`."""
    return _interval(successes, n, confidence, "exact")


def _interval(
    successes: int, n: int, confidence: float, method: Literal["wilson", "exact"]
) -> tuple[float, float]:
    if not 0 <= successes <= n:
        raise ValueError(f"Found {successes} successes in {n} trials; expected 0 to {n}.")
    if not 0 < confidence < 1:
        raise ValueError(f"Found confidence {confidence}; expected a fraction between 0 and 1.")
    if n == 0:
        return 0.0, 1.0
    found = stats.binomtest(successes, n).proportion_ci(confidence, method)
    return float(found.low), float(found.high)


def paired_bootstrap(
    differences_by_cluster: Sequence[Sequence[float]],
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean difference, in the differences' own unit.

    One cluster is one prompt with the differences of all its seeds: clusters are drawn with
    replacement and keep all that is in them, since clips of one prompt are alike.
    Raises ValueError if there is no difference at all.
    """
    clusters = [np.asarray(cluster, float) for cluster in differences_by_cluster if len(cluster)]
    if not clusters:
        raise ValueError("Found no differences; expected at least one cluster that holds one.")
    sums = np.array([(cluster.sum(), len(cluster)) for cluster in clusters], float)
    return bootstrap(sums, lambda m: m[..., 0] / m[..., 1], resamples, seed, confidence)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of McNemar's test.

    b, c: pairs in which only the first, and only the second, succeeded. Pairs must be
    independent. Without such pairs p is 1.
    """
    if b < 0 or c < 0:
        raise ValueError(f"Found {b} and {c} discordant pairs; counts cannot be negative.")
    return float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """P-values adjusted for being a family, by Holm's step-down method, in the order given."""
    p = np.asarray(pvalues, float)
    if p.size == 0:
        return []
    if not ((p >= 0) & (p <= 1)).all():
        raise ValueError(f"Found p-values {list(pvalues)}; expected numbers in [0, 1].")
    order = np.argsort(p, kind="stable")
    stepped = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    adjusted = np.empty_like(stepped)
    adjusted[order] = stepped
    return [float(value) for value in adjusted]


def sign_flip(
    differences_by_cluster: Sequence[Sequence[float]], resamples: int = 10_000, seed: int = 0
) -> float:
    """Two-sided p-value for a mean difference of 0, by flipping the signs of whole clusters.

    Where two models are alike, a prompt's differences could as well have been the other way round,
    all at once: p is the share of such draws whose mean is as far from 0 as the one found, which is
    counted as a draw too. Unlike McNemar's test it takes several pairs of one prompt. Raises
    ValueError if there is no difference at all.
    """
    totals = np.array(
        [float(np.sum(cluster)) for cluster in differences_by_cluster if len(cluster)]
    )
    if not len(totals):
        raise ValueError("Found no differences; expected at least one cluster that holds one.")
    # To flip a sign is to exchange what was found with its opposite, or halves of both.
    half = totals[:, None] / 2
    return swap(-half, half, lambda a, b: (b - a)[..., 0], resamples, seed)


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a function of means, by drawing rows of `values` (n, k) anew.

    statistic: of the columns' means, (..., k) -> (...). Raises ValueError without rows.
    """
    if not len(values):
        raise ValueError("Found no rows; expected at least one.")
    share = np.full(len(values), 1.0 / len(values))
    drawn = np.random.default_rng(seed).multinomial(len(values), share, size=resamples)
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(statistic(drawn @ values / len(values)), [tail, 1.0 - tail])
    return float(low), float(high)


def swap(
    a: np.ndarray,
    b: np.ndarray,
    difference: Callable[[np.ndarray, np.ndarray], np.ndarray],
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of a difference between functions of the means of a and b, both (n, k), of
    which the rows are paired: how often it is as far from 0 when the two are exchanged in rows
    drawn at random. What is found counts as a draw too.

    difference: of the columns' means, (..., k) and (..., k) -> (...).
    """
    exchanged = np.random.default_rng(seed).random((resamples, len(a))) < 0.5
    moved = exchanged @ (b - a) / len(a)
    found = abs(difference(a.mean(0), b.mean(0)))
    drawn = np.abs(difference(a.mean(0) + moved, b.mean(0) - moved))
    # What is equal but for rounding is equal.
    return float((1 + (drawn >= found - 1e-9 * max(1.0, found)).sum()) / (1 + resamples))
