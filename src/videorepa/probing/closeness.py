"""How close two token grids are: relation error and linear CKA."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.align.resampling import resample
from videorepa.evaluation.statistics import paired_bootstrap
from videorepa.losses.relation import Relation
from videorepa.probing.records import Reading
from videorepa.system.checks import check_finite
from videorepa.tokens import TokenGrid

SMALLEST_SHARE = 1e-6
"""Features whose deviation is a smaller share of their norm do not vary: float32 rounds so."""


def linear_cka(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """Linear CKA of the same n tokens in two models, 0 to 1 (Kornblith et al. 2019, 1905.00414).

    CKA = |Y'X|^2 / (|X'X| |Y'Y|), with X and Y centred over the tokens, in float32 or wider. It is
    1 for features that are equal up to a rotation, a scale and an offset, and 0 where either does
    not vary. Unrelated features about as wide as there are tokens are well above 0, so compare it
    with a straw man's.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = _centred(x), _centred(y)
        if len(x) <= max(x.shape[1], y.shape[1]):
            # The same three numbers from n x n products: |Y'X|^2 is the inner product of XX', YY'.
            ours, theirs = x @ x.mT, y @ y.mT
            shared = (ours * theirs).sum()
        else:
            ours, theirs = x.mT @ x, y.mT @ y
            shared = (y.mT @ x).square().sum()
        norms = ours.norm() * theirs.norm()
        return torch.where(norms > 0, shared / torch.where(norms > 0, norms, 1.0), 0.0)


def _centred(x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Subtract the mean token and scale to norm 1, so that CKA's fourth powers do not overflow.

    Zero if nothing but rounding is left.
    """
    x = x if x.dtype == torch.float64 else x.float()
    varying = x - x.mean(0)
    length = varying.norm()
    return torch.where(length > SMALLEST_SHARE * x.norm(), varying / length, 0.0)


def closeness(student: TokenGrid, teacher: TokenGrid) -> dict[str, list[float]]:
    """Measure each clip's relation error and CKA, with the student's tokens on the teacher's grid.

    The relation error is TRD with margin 0: the mean, over all pairs of a clip's tokens, of how far
    apart their cosine similarity is in the two, from 0 to 2. Neither measure depends on the width,
    so there is no projector.
    """
    by_clip: dict[str, list[float]] = {"relation_error": [], "cka": []}
    # Clip by clip: relations of the published grid take 52 MB for each.
    for ours, theirs in zip(student.tokens.split(1), teacher.tokens.split(1), strict=True):
        like = teacher.with_tokens(theirs.to(ours.device, torch.float32))
        met = resample(student.with_tokens(ours.float()), like=like)
        cka = linear_cka(met.tokens.flatten(0, 3), like.tokens.flatten(0, 3))
        by_clip["relation_error"].append(Relation(margin=0.0)(met, like).item())
        by_clip["cka"].append(cka.item())
    return by_clip


def mean_reading(
    measure: str,
    values: Sequence[float],
    teacher: str,
    source: str,
    block: int | None = None,
    noise: float | None = None,
) -> Reading:
    """The mean of a measure's values, one for each clip. Raises UserError if one is not finite."""
    place = source if block is None else f"block {block} at noise {noise:g}"
    check_finite(f"The features of {place}", np.asarray(values))
    low, high = paired_bootstrap([[value] for value in values])
    return Reading(
        measure=measure,
        source=source,
        value=float(np.mean(values)),
        low=low,
        high=high,
        n=len(values),
        sd=float(np.std(values, ddof=1)),
        block=block,
        noise=noise,
        teacher=teacher,
    )
