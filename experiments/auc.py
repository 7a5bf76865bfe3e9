"""How well a linear probe tells a yes-or-no label, as the area under the ROC curve."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float, Int

from videorepa.probing.readout import FOLDS, PrincipalAxes

INNER_FOLDS = 3

STRENGTHS = (1e-2, 1e0, 1e2, 1e4)
"""Inverse strengths of regularisation to choose from, for features of mean square length 1."""

RESAMPLES = 2000


@dataclass(frozen=True)
class LabelAuc:
    """The area under the ROC curve: 0.5 is chance, 1 is faultless.

    Attributes:
        auc: The share of pairs of a yes and a no of which the yes scores higher.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        n: Number of clips.
    """

    auc: float
    low: float
    high: float
    n: int


def read_label(features: Float[np.ndarray, "n d"], label: Bool[np.ndarray, " n"]) -> LabelAuc:
    """Measure how well a logistic regression predicts the label of clips it was not fitted to.

    There are five folds, stratified by label. In each, features are standardised on the fitted
    clips (`PrincipalAxes`) and scaled to a mean square length of 1. Three inner folds choose the
    regularisation by log loss. Scores of different fits cannot be compared, so the AUC counts only
    pairs that were held out in the same fold. The interval is a bootstrap over clips that keeps
    the fits.

    Args:
        features: A row for each clip.
        label: Whether each clip has the label.

    Raises:
        ValueError: Either answer has fewer than 10 clips.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV, StratifiedKFold

    if min(label.sum(), (~label).sum()) < 2 * FOLDS:
        raise ValueError(
            f"{label.sum()} clips have the label and {(~label).sum()} have not; expected at least "
            f"{2 * FOLDS} of each."
        )
    score = np.empty(len(label))
    fold = np.empty(len(label), int)
    splits = StratifiedKFold(FOLDS, shuffle=True, random_state=0).split(features, label)
    for number, (fitted, held_out) in enumerate(splits):
        axes = PrincipalAxes(features[fitted])
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
) -> LabelAuc:
    pairs = label[:, None] & ~label[None, :] & (fold[:, None] == fold[None, :])
    difference = score[:, None] - score[None, :]
    won = pairs * ((difference > 0) + 0.5 * (difference == 0))
    n = len(label)
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES)
    counted = ((drawn @ pairs) * drawn).sum(1)
    # With few clips, a draw may hold no pair at all.
    areas = ((drawn @ won) * drawn).sum(1)[counted > 0] / counted[counted > 0]
    low, high = np.quantile(areas, [0.025, 0.975])
    return LabelAuc(float(won.sum() / pairs.sum()), float(low), float(high), n)
