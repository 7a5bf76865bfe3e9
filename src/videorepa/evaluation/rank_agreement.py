"""How alike two variables rank the same clips, with intervals that draw whole captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from videorepa.evaluation.statistics import draws

RESAMPLES = 10_000

BLOCK = 256
"""Clips, or bootstrap samples, that are worked on at once."""

FEWEST_DEFINED = 0.95
"""Share of the bootstrap's samples that need a value for an interval. A sample without a clip that
people rate differently has none."""

CHANCE = {"auc": 0.5, "same caption": 0.5, "spearman": 0.0, "kendall": 0.0}
"""The statistics, and what a judge has of each whose scores tell nothing."""


class RankAgreement:
    """A judge's scores beside people's ratings of the same clips.

    With s = sign(x_i - x_j) and t = sign(y_i - y_j), in sums over all ordered pairs of clips:

    - auc: (1 + sum s t / sum t^2) / 2, the share of pairs which people rate differently that the
      judge orders as they do. Ties of the judge count half. For ratings of two values it is the
      area under the ROC curve.
    - same caption: the same over pairs of clips of one caption. A judge that reads nothing but the
      caption is at 1/2.
    - spearman: the correlation of midranks.
    - kendall: tau-b, sum s t / sqrt(sum s^2 sum t^2).

    A bootstrap's sample holds caption c m_c times, so all of them follow from sums over pairs of
    captions, weighted by m_c m_d.
    """

    def __init__(self, x: Sequence[float], y: Sequence[float], captions: Sequence[str]) -> None:
        _, caption = np.unique(np.asarray(captions, str), return_inverse=True)
        order = np.argsort(caption, kind="stable")
        self._x, self._y, self._of = (np.asarray(v)[order] for v in (x, y, caption))
        self.clips, self.captions = len(self._of), int(caption.max(initial=-1)) + 1
        starts = np.searchsorted(self._of, np.arange(self.captions))

        def by_caption(values: np.ndarray) -> np.ndarray:
            return np.add.reduceat(values, starts, axis=-1)

        blocks = []
        for first in range(0, self.clips, BLOCK):
            part = slice(first, first + BLOCK)
            s, t = _signs(self._x[part], self._x), _signs(self._y[part], self._y)
            blocks.append([by_caption(v) for v in (s, t, s * t, s * s, t * t)])
        nothing = [np.zeros((0, 0))] * 5
        s, t, st, ss, tt = map(np.concatenate, zip(*blocks, strict=True)) if blocks else nothing
        # (clips, captions): twice the rank of a clip among those of each caption, from the middle.
        self._ranks = s, t
        # (captions, captions)
        self._st, self._ss, self._tt = (by_caption(v.T) if blocks else v for v in (st, ss, tt))

    def value(self, statistic: str) -> float:
        """A statistic over all clips; NaN where it has no value, as of clips rated alike."""
        return float(self._under(np.ones((1, self.captions)), statistic)[0])

    def drawn(self, statistic: str) -> np.ndarray:
        """A statistic in the bootstrap's samples, which are the same for the same captions."""
        if not self.captions:
            return np.full(RESAMPLES, np.nan)
        return self._under(draws(self.captions, RESAMPLES).astype(float), statistic)

    def _under(self, weights: np.ndarray, statistic: str) -> np.ndarray:
        """A statistic of samples that hold each caption as often as weights, (r, captions), say."""

        def over(pairs: np.ndarray) -> np.ndarray:
            return ((weights @ pairs) * weights).sum(1)

        with np.errstate(invalid="ignore", divide="ignore"):
            if statistic == "auc":
                return (1 + over(self._st) / over(self._tt)) / 2
            if statistic == "same caption":
                own = weights @ self._st.diagonal(), weights @ self._tt.diagonal()
                return (1 + own[0] / own[1]) / 2
            if statistic == "kendall":
                return over(self._st) / np.sqrt(over(self._ss) * over(self._tt))
            return self._spearman(weights)

    def _spearman(self, weights: np.ndarray) -> np.ndarray:
        values = [np.zeros(0)]
        for first in range(0, len(weights), BLOCK):
            part = weights[first : first + BLOCK]
            w = part[:, self._of]
            a, b = (part @ ranks.T for ranks in self._ranks)
            values.append((w * a * b).sum(1) / np.sqrt((w * a * a).sum(1) * (w * b * b).sum(1)))
        return np.concatenate(values)


def _signs(some: np.ndarray, all_: np.ndarray) -> np.ndarray:
    above, below = some[:, None] > all_, some[:, None] < all_
    return above.astype(float) - below


def interval(drawn: np.ndarray) -> tuple[float | None, float | None]:
    """The 95 % percentile interval of a bootstrap's values.

    Returns:
        Two Nones if too few samples have a value, or if all have the same: that says nothing of how
        far off it may be.
    """
    defined = drawn[np.isfinite(drawn)]
    if len(defined) < FEWEST_DEFINED * len(drawn) or np.ptp(defined) < 1e-12:
        return None, None
    low, high = np.quantile(defined, [0.025, 0.975])
    return float(low), float(high)


def difference(a: RankAgreement, b: RankAgreement, statistic: str) -> dict[str, Any] | None:
    """B's statistic minus A's, of two judges of the same clips; None if either has no value.

    p is twice the share of the bootstrap's samples on the rarer side of 0, in which samples at 0
    count on both sides, and the observed one is a sample too.
    """
    value = b.value(statistic) - a.value(statistic)
    drawn = b.drawn(statistic) - a.drawn(statistic)
    defined = drawn[np.isfinite(drawn)]
    if not np.isfinite(value) or len(defined) < FEWEST_DEFINED * len(drawn):
        return None
    low, high = np.quantile(defined, [0.025, 0.975])
    rarer = min((defined <= 0).sum(), (defined >= 0).sum())
    return {
        "difference": value,
        "low": float(low),
        "high": float(high),
        "p": float(min(1.0, 2 * (1 + rarer) / (1 + len(defined)))),
        "n": a.clips,
        "prompts": a.captions,
    }
