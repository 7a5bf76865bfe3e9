"""Intervals and tests for shares and paired differences."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import stats

_DRAWN_AT_ONCE = 2_000_000
"""Most numbers that are drawn at once; more take memory and no less time."""


def wilson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of a share.

    With p = successes / n and z the normal quantile of (1 + confidence) / 2, it is
    (p + z^2 / (2 n) +- z sqrt(p (1 - p) / n + z^2 / (4 n^2))) / (1 + z^2 / n). It assumes
    independent trials.

    Returns:
        Two fractions in [0, 1]; (0, 1) without trials.

    Raises:
        ValueError: Unless 0 <= successes <= n and 0 < confidence < 1.
    """
    return _interval(successes, n, confidence, "wilson")


def wilson_of_clusters(clusters: Sequence[Sequence[float]]) -> tuple[float, float]:
    """Wilson's 95 % interval of a share, with the number of trials that clusters are worth.

    Trials of a cluster, such as clips of one caption, are alike, so n trials are worth fewer
    independent ones: p (1 - p) / v, where v = sum_i (successes_i - p n_i)^2 / n^2 is the variance
    of the share over clusters i of n_i trials. That is n for clusters of one trial each, and the
    number of clusters if the trials of each are equal. It is held between these two.

    Args:
        clusters: The outcomes of each cluster, 1 or 0.

    Returns:
        Two fractions in [0, 1]; (0, 1) without trials.
    """
    filled = [cluster for cluster in clusters if len(cluster)]
    successes = np.array([sum(cluster) for cluster in filled], float)
    sizes = np.array([len(cluster) for cluster in filled], float)
    n = sizes.sum()
    if not n:
        return 0.0, 1.0
    share = successes.sum() / n
    variance = np.square(successes - share * sizes).sum() / n**2
    # Equal clusters tell nothing of how much their trials are alike.
    worth = share * (1 - share) / variance if variance else 0.0
    worth = min(max(worth, len(filled)), n)
    z = stats.norm.ppf(0.975)
    centre = share + z**2 / (2 * worth)
    reach = z * np.sqrt(share * (1 - share) / worth + z**2 / (4 * worth**2))
    ends = np.array([centre - reach, centre + reach]) / (1 + z**2 / worth)
    low, high = ends.clip(0, 1)
    return float(low), float(high)


def clopper_pearson(successes: int, n: int, confidence: float = 0.95) -> tuple[float, float]:
    """The exact interval of a share, which covers it with a probability of `confidence` or more.

    Arguments, result and errors are those of `wilson`.
    """
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
    interval = stats.binomtest(successes, n).proportion_ci(confidence, method)
    return float(interval.low), float(interval.high)


def paired_bootstrap(
    differences_by_cluster: Sequence[Sequence[float]],
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of the mean difference, by drawing whole clusters with replacement.

    Clips of one prompt resemble each other, so a prompt's differences are drawn together.

    Args:
        differences_by_cluster: The differences of each prompt over all of its seeds.

    Returns:
        The interval in the differences' own unit.

    Raises:
        ValueError: There is no difference at all.
    """
    clusters = [np.asarray(cluster, float) for cluster in differences_by_cluster if len(cluster)]
    if not clusters:
        raise ValueError("Found no differences; expected at least one cluster that holds one.")
    sums = np.array([(cluster.sum(), len(cluster)) for cluster in clusters], float)
    return bootstrap(sums, lambda m: m[..., 0] / m[..., 1], resamples, seed, confidence)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value of McNemar's test: min(1, 2 P(X <= min(b, c))), X ~ Bin(b + c, 1/2).

    It assumes independent pairs, and is 1 without discordant ones.

    Args:
        b: Pairs in which only the first succeeded.
        c: Pairs in which only the second succeeded.

    Raises:
        ValueError: A count is negative.
    """
    if b < 0 or c < 0:
        raise ValueError(f"Found {b} and {c} discordant pairs; counts cannot be negative.")
    return float(stats.binomtest(b, b + c).pvalue) if b + c else 1.0


def holm(pvalues: Sequence[float]) -> list[float]:
    """P-values of a family of tests, adjusted by Holm's step-down method.

    The i-th smallest of m becomes max over j <= i of min(1, (m - j + 1) p_j). The order is kept.

    Raises:
        ValueError: A p-value is outside [0, 1].
    """
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
    """Two-sided p-value of a mean difference, by flipping the signs of random clusters.

    If two models do not differ, a cluster's differences could equally well have the opposite signs.
    p is the share of draws whose mean is at least as far from 0 as the observed one, which is a
    draw too. Unlike McNemar's test, this allows several pairs per cluster.

    Args:
        differences_by_cluster: The differences of each prompt over all of its seeds.

    Raises:
        ValueError: There is no difference at all.
    """
    totals = np.array([sum(cluster) for cluster in differences_by_cluster if len(cluster)], float)
    if not len(totals):
        raise ValueError("Found no differences; expected at least one cluster that holds one.")
    # Flipping the sign of a total is exchanging its two halves, -total / 2 and total / 2.
    half = totals[:, None] / 2
    return swap(-half, half, lambda a, b: (b - a)[..., 0], resamples, seed)


def bootstrap(
    values: np.ndarray,
    statistic: Callable[[np.ndarray], np.ndarray],
    resamples: int = 10_000,
    seed: int = 0,
    confidence: float = 0.95,
) -> tuple[float, float]:
    """Percentile interval of a function of means, by drawing rows with replacement.

    Args:
        values: (n, k).
        statistic: The function of the columns' means, (..., k) -> (...).

    Raises:
        ValueError: There are no rows.
    """
    if not len(values):
        raise ValueError("Found no rows; expected at least one.")
    n = len(values)
    means = np.concatenate([drawn @ values / n for drawn in _drawn(n, resamples, seed)])
    tail = (1.0 - confidence) / 2
    low, high = np.quantile(statistic(means), [tail, 1.0 - tail])
    return float(low), float(high)


def draws(n: int, resamples: int = 10_000, seed: int = 0) -> np.ndarray:
    """How often each sample of a bootstrap holds each of n rows: (resamples, n)."""
    return np.concatenate([*_drawn(n, resamples, seed)])


def _drawn(n: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """`draws` in blocks, since those of thousands of rows take gigabytes."""
    rng = np.random.default_rng(seed)
    for size in _blocks(resamples, n):
        yield rng.multinomial(n, np.full(n, 1.0 / n), size=size)


def _blocks(resamples: int, n: int) -> Iterator[int]:
    """How many of the resamples, each of n numbers, to draw at once."""
    most = max(1, _DRAWN_AT_ONCE // n)
    for first in range(0, resamples, most):
        yield min(most, resamples - first)


def swap(
    a: np.ndarray,
    b: np.ndarray,
    difference: Callable[[np.ndarray, np.ndarray], np.ndarray],
    resamples: int = 10_000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of a difference between two paired samples, by exchanging random rows.

    p is the share of draws in which the difference is at least as far from 0 as the observed one,
    which counts as a draw too.

    Args:
        a: (n, k). Its rows are paired with those of b.
        b: (n, k).
        difference: A function of both samples' column means, (..., k) and (..., k) -> (...).
    """
    rng, n = np.random.default_rng(seed), len(a)
    moved = np.concatenate(
        [(rng.random((size, n)) < 0.5) @ (b - a) / n for size in _blocks(resamples, n)]
    )
    observed = abs(difference(a.mean(0), b.mean(0)))
    drawn = np.abs(difference(a.mean(0) + moved, b.mean(0) - moved))
    # Differences that are equal up to rounding count as equal.
    threshold = observed - 1e-9 * max(1.0, observed)
    return float((1 + (drawn >= threshold).sum()) / (1 + resamples))


@dataclass(frozen=True)
class MeanOfFew:
    """The mean of a few independent values, such as differences between trainings.

    Attributes:
        low: Lower end of Student's 95 % interval; minus infinity for values without spread, as a
            single one: a few shares of few clips can be equal by chance.
        high: Upper end.
        p: Two-sided p-value of the t-test that the mean is 0; 1 without spread.
        smallest: The smallest mean that so many values would show, with p below 0.05, in 80 % of
            repetitions, about: (t(0.975) + t(0.8)) s / sqrt(n). Infinity without spread.
    """

    value: float
    low: float
    high: float
    p: float
    smallest: float


def mean_of_few(values: Sequence[float]) -> MeanOfFew:
    """The mean of independent values with Student's interval, which takes them to be normal.

    Raises:
        ValueError: There is no value.
    """
    n = len(values)
    if not n:
        raise ValueError("Found no values; expected at least one.")
    mean = float(np.mean(values))
    error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else 0.0
    if not error:
        return MeanOfFew(mean, -math.inf, math.inf, 1.0, math.inf)
    reach, power = (float(stats.t.ppf(share, n - 1)) for share in (0.975, 0.8))
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1))
    return MeanOfFew(mean, mean - reach * error, mean + reach * error, p, (reach + power) * error)
