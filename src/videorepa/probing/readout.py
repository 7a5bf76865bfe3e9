"""Fits a logistic regression to features and a yes-or-no label, and scores unseen clips."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

FOLDS = 5

SMALLEST_SQUARE = 1e-10
"""Variance of a principal axis that counts, as a share of the greatest."""

COLUMNS = 4096
"""Features multiplied at a time."""


@dataclass(frozen=True)
class Decided:
    """The answers of a fitted readout.

    Attributes:
        strength: The inverse strength of regularisation that was chosen.
        score: Of each unseen clip; above 0 is a yes.
    """

    strength: float
    score: Float[np.ndarray, " n"]


class Axes:
    """Features standardised by the fitted clips and, if there are more features than clips, turned
    on their principal axes.

    Turning loses nothing. With an L2 penalty a logistic regression is the same on all axes, and its
    weights are 0 across the span of the fitted clips. So there are never more axes than clips.

    Args:
        features: The fitted clips'. On the axes they are in `fitted`; other clips' are from a call.
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
        """Bring other clips' features to the same axes."""
        if self._turn is None:
            return (features - self._mean) / self._scale
        return self._products(features) @ self._turn

    def _products(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m n"]:
        """Products of these clips with the fitted ones, all standardised."""
        total = np.zeros((len(features), len(self._features)))
        # Some features at a time, since there can be 100,000.
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

    Features are standardised by the fitted clips. The first strength with the highest accuracy in
    five stratified folds is taken.

    Args:
        label: At least `FOLDS` clips have it, and as many have not.
        strengths: Inverse strengths of regularisation to choose from.
        seed: Of the folds.
        iterations: The most that a fit may take.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

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
        accuracies.append([each.score(outside, label[held_out]) for each in fits])
    best = strengths[int(np.mean(accuracies, 0).argmax())]
    axes = Axes(features)
    return Decided(best, fit(axes, label, best).decision_function(axes(unseen)))
