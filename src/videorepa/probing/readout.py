"""Reads a yes-or-no label from features with a linear probe, and says how well that went."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

FOLDS = 5

INNER_FOLDS = 3

STRENGTHS = (1e-2, 1e0, 1e2, 1e4)
"""Inverse strengths of regularisation to choose from, for features of mean square length 1."""

RESAMPLES = 2000

SMALLEST_SQUARE = 1e-10
"""Variance of a principal axis that counts, as a share of the greatest."""

COLUMNS = 4096
"""Features multiplied at a time."""


@dataclass(frozen=True)
class Readout:
    """ROC AUC with its 95 % interval: 0.5 is chance, 1 is without a fault. n: clips."""

    auc: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Decided:
    """strength: the inverse strength of regularisation that was chosen. score: of each clip; above
    0 is a yes."""

    strength: float
    score: Float[np.ndarray, " n"]


class Axes:
    """Features standardised as those that are fitted to, and turned on their principal axes if that
    leaves fewer of them.

    Turning loses nothing: with an L2 penalty, a logistic regression is the same on all axes, and
    weights across the fitted clips' span are 0. Wide features become as many as there are clips.
    """

    def __init__(self, features: Float[np.ndarray, "n d"]) -> None:
        from sklearn.preprocessing import StandardScaler

        scaler: Any = StandardScaler().fit(features)
        self._mean, self._scale, self._features = scaler.mean_, scaler.scale_, features
        self._turn = None
        if features.shape[1] <= len(features) or not scaler.var_.any():
            self.fitted = (features - self._mean) / self._scale
            return
        squares, directions = np.linalg.eigh(self._products(features))
        kept = squares > SMALLEST_SQUARE * squares[-1]
        lengths = np.sqrt(squares[kept])
        self._turn = directions[:, kept] / lengths
        self.fitted = directions[:, kept] * lengths

    def __call__(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m r"]:
        """Other clips' features on the same axes."""
        if self._turn is None:
            return (features - self._mean) / self._scale
        return self._products(features) @ self._turn

    def _products(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m n"]:
        """Of these clips with those that are fitted to, standardised; some features at a time,
        since there can be 100,000."""
        total = np.zeros((len(features), len(self._features)))
        for first in range(0, features.shape[1], COLUMNS):
            part = slice(first, first + COLUMNS)
            mean, scale = self._mean[part], self._scale[part]
            ours, theirs = features[:, part], self._features[:, part]
            total += ((ours - mean) / scale) @ ((theirs - mean) / scale).T
        return total


def decide(
    features: Float[np.ndarray, "n d"],
    label: Bool[np.ndarray, " n"],
    unseen: Float[np.ndarray, "m d"],
    strengths: Sequence[float],
    *,
    seed: int,
    iterations: int,
) -> Decided:
    """Fit a logistic regression to clips and their label, and score clips that it has not seen.

    Features are standardised on the clips fitted to; of the inverse strengths of regularisation,
    the first with the highest accuracy in five stratified folds, shuffled by the seed, is taken.
    iterations: at most so many for a fit. Raises ValueError unless either answer has 5 clips.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    if min(label.sum(), (~label).sum()) < FOLDS:
        raise ValueError(
            f"Found {label.sum()} clips that have the label and {(~label).sum()} that have not; "
            f"expected at least {FOLDS} of each to fit to."
        )

    def fit(axes: Axes, label: np.ndarray, strength: float) -> LogisticRegression:
        with warnings.catch_warnings():
            # The weakest strengths let the weights grow without end where a line parts the clips.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=strength, max_iter=iterations).fit(axes.fitted, label)

    accuracies = []
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(features, label)
    for fitted, held_out in splits:
        axes = Axes(features[fitted])
        outside = axes(features[held_out])
        fits = (fit(axes, label[fitted], strength) for strength in strengths)
        accuracies.append([found.score(outside, label[held_out]) for found in fits])
    best = strengths[int(np.mean(accuracies, 0).argmax())]
    axes = Axes(features)
    return Decided(best, fit(axes, label, best).decision_function(axes(unseen)))


def read_label(features: Float[np.ndarray, "n d"], label: Bool[np.ndarray, " n"]) -> Readout:
    """How well a logistic regression tells the label of clips that it was not fitted to.

    Five folds, stratified by label. In each, features are standardised on the clips that are fitted
    to (`Axes`) and scaled to a mean square length of 1; the regularisation is the one with the
    lowest log loss in three further folds within. The AUC is the share of pairs of a yes and a no,
    both held out in the same fold, of which the yes scores higher: scores of different fits cannot
    be compared. The interval is a bootstrap over clips, with the fits as they are.

    Raises ValueError unless either answer has at least 10 clips.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    if min(label.sum(), (~label).sum()) < 2 * FOLDS:
        raise ValueError(
            f"Found {label.sum()} clips that have the label and {(~label).sum()} that have not; "
            f"expected at least {2 * FOLDS} of each."
        )
    score = np.empty(len(label))
    fold = np.empty(len(label), int)
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, label)
    for number, (fitted, held_out) in enumerate(splits):
        axes = Axes(features[fitted])
        length = np.sqrt((axes.fitted**2).sum(1).mean()) or 1.0
        search = GridSearchCV(
            LogisticRegression(max_iter=1000),
            {"C": STRENGTHS},
            cv=INNER_FOLDS,
            scoring="neg_log_loss",
        ).fit(axes.fitted / length, label[fitted])
        score[held_out] = search.decision_function(axes(features[held_out]) / length)
        fold[held_out] = number
    return _area(score, label, fold)


def _area(
    score: Float[np.ndarray, " n"], label: Bool[np.ndarray, " n"], fold: Int[np.ndarray, " n"]
) -> Readout:
    pairs = label[:, None] & ~label[None, :] & (fold[:, None] == fold[None, :])
    difference = score[:, None] - score[None, :]
    won = pairs * ((difference > 0) + 0.5 * (difference == 0))
    n = len(label)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    counted = ((drawn @ pairs) * drawn).sum(1)
    # With few clips, a draw may hold no pair at all.
    areas = ((drawn @ won) * drawn).sum(1)[counted > 0] / counted[counted > 0]
    low, high = np.quantile(areas, [0.025, 0.975])
    return Readout(float(won.sum() / pairs.sum()), float(low), float(high), n)
