"""Fits a logistic regression to features and a yes-or-no label, and scores unseen clips."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

FOLDS = 5

SMALLEST_SQUARE = 1e-10
"""Smallest variance of a principal axis that counts, as a share of the greatest."""

COLUMNS = 4096
"""Number of features to multiply at once."""


class PrincipalAxes:
    """Standardises features by the fitted clips, and projects them if there are more than clips.

    The projection is onto the fitted clips' principal axes and loses nothing: with an L2 penalty a
    logistic regression does not depend on the choice of axes, and its weights have no part
    orthogonal to the fitted clips.

    Args:
        features: Those of the fitted clips.

    Attributes:
        fitted: The fitted clips' features on the axes. Call the object for other clips.
    """

    def __init__(self, features: Float[np.ndarray, "n d"]) -> None:
        from sklearn.preprocessing import StandardScaler

        scaler: Any = StandardScaler().fit(features)
        self._mean, self._scale, self._features = scaler.mean_, scaler.scale_, features
        self._projection = None
        if features.shape[1] <= len(features) or not scaler.var_.any():
            self.fitted = (features - self._mean) / self._scale
            return
        squares, directions = np.linalg.eigh(self._products(features))
        kept = squares > SMALLEST_SQUARE * squares[-1]
        lengths = np.sqrt(squares[kept])
        self._projection = directions[:, kept] / lengths
        self.fitted = directions[:, kept] * lengths

    def __call__(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m r"]:
        """The features of other clips on the same axes."""
        if self._projection is None:
            return (features - self._mean) / self._scale
        return self._products(features) @ self._projection

    def _products(self, features: Float[np.ndarray, "m d"]) -> Float[np.ndarray, "m n"]:
        """Inner products of these clips with the fitted ones, all standardised."""
        total = np.zeros((len(features), len(self._features)))
        # In blocks of columns, since there can be 100,000 features.
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
) -> tuple[Float[np.ndarray, " m"], float]:
    """Fit a logistic regression to clips and their labels, and score clips that it has not seen.

    Features are standardised by the fitted clips. The regularisation is the first with the highest
    accuracy in five stratified folds.

    Args:
        label: True for at least `FOLDS` clips, and False for as many.
        strengths: Inverse strengths of regularisation to choose from.
        seed: Seed of the folds.
        iterations: Largest number of iterations of a fit.

    Returns:
        The score of each unseen clip, above 0 for a yes, and the chosen strength.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold

    def fit(axes: PrincipalAxes, label: np.ndarray, strength: float) -> LogisticRegression:
        with warnings.catch_warnings():
            # Without much regularisation, weights grow without end if the labels are separable.
            warnings.simplefilter("ignore", ConvergenceWarning)
            return LogisticRegression(C=strength, max_iter=iterations).fit(axes.fitted, label)

    accuracies = []
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=seed).split(features, label)
    for fitted, held_out in splits:
        axes = PrincipalAxes(features[fitted])
        outside = axes(features[held_out])
        fits = (fit(axes, label[fitted], strength) for strength in strengths)
        accuracies.append([each.score(outside, label[held_out]) for each in fits])
    best = strengths[int(np.mean(accuracies, 0).argmax())]
    axes = PrincipalAxes(features)
    return fit(axes, label, best).decision_function(axes(unseen)), best
