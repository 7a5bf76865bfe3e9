"""How close two token grids are, and what a grid's own relations are like."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.align.resampling import resample
from videorepa.evaluation.statistics import paired_bootstrap
from videorepa.losses import Relations
from videorepa.losses.relation import Relation
from videorepa.probing.records import Measurement
from videorepa.system.checks import check_finite
from videorepa.tokens import TokenGrid

SMALLEST_SHARE = 1e-6
"""Share of the features' norm below which their deviation is a rounding error of float32."""


def linear_cka(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """Linear CKA of the same n tokens in two models, 0 to 1 (Kornblith et al. 2019, 1905.00414).

    CKA = |Y'X|^2 / (|X'X| |Y'Y|), with X and Y centred over the tokens, in float32 or wider. It is
    1 for features that are equal up to a rotation, a scale and an offset, and 0 if either does not
    vary. For unrelated features that are about as wide as there are tokens it is well above 0, so
    compare it with a straw man's.
    """
    with torch.autocast(x.device.type, enabled=False):
        x, y = _centred(x), _centred(y)
        if len(x) <= max(x.shape[1], y.shape[1]):
            # Smaller n x n products give the same: |Y'X|^2 is the inner product of XX' and YY'.
            ours, theirs = x @ x.mT, y @ y.mT
            shared = (ours * theirs).sum()
        else:
            ours, theirs = x.mT @ x, y.mT @ y
            shared = (y.mT @ x).square().sum()
        norms = ours.norm() * theirs.norm()
        return torch.where(norms > 0, shared / torch.where(norms > 0, norms, 1.0), 0.0)


def _centred(x: Float[Tensor, "n p"]) -> Float[Tensor, "n p"]:
    """Subtract the mean token and scale to norm 1, so that CKA's fourth powers do not overflow.

    The result is zero if the features differ by rounding alone.
    """
    x = x if x.dtype == torch.float64 else x.float()
    varying = x - x.mean(0)
    length = varying.norm()
    return torch.where(length > SMALLEST_SHARE * x.norm(), varying / length, 0.0)


def closeness(student: TokenGrid, teacher: TokenGrid, others: TokenGrid) -> dict[str, list[float]]:
    """Measure how close each clip's relations are, with the student's tokens on the teacher's grid.

    A relation is the cosine of two of a clip's tokens. The relation error is TRD with margin 0: the
    mean absolute difference of all relations, from 0 to 2. The relation correlation is Pearson's,
    from -1 to 1, so it does not see the relations' mean and spread. Most of what it sees can be
    where tokens are, which is the same in every clip. The clip correlation is how much higher it is
    than with the teacher's relations of another clip, from -2 to 2; 0 for what knows nothing of the
    clip. No measure depends on the features' width, so there is no projector.

    Args:
        others: The teacher's tokens of another clip for each.

    Returns:
        A value for each clip, for "relation_error", "relation_correlation", "clip_correlation" and
        "cka", and what `spread` gives of the student.
    """
    by_clip: dict[str, list[float]] = defaultdict(list)
    each = (grid.tokens.split(1) for grid in (student, teacher, others))
    # One clip at a time, since its relations take 52 MB for the published grid.
    for ours, theirs, another in zip(*each, strict=True):
        like, unlike = (
            teacher.with_tokens(tokens.to(ours.device, torch.float32))
            for tokens in (theirs, another)
        )
        resampled = resample(student.with_tokens(ours.float()), like=like)
        relations = Relations(resampled)
        correlation = relations.correlation(Relations(like)).item()
        cka = linear_cka(resampled.tokens.flatten(0, 3), like.tokens.flatten(0, 3))
        by_clip["relation_error"].append(Relation(margin=0.0)(resampled, like).item())
        by_clip["relation_correlation"].append(correlation)
        by_clip["clip_correlation"].append(
            correlation - relations.correlation(Relations(unlike)).item()
        )
        by_clip["cka"].append(cka.item())
        for measure, values in spread(relations).items():
            by_clip[measure] += values
    return by_clip


def own(teacher: TokenGrid, others: TokenGrid) -> dict[str, list[float]]:
    """Measure a teacher's own relations.

    Args:
        others: The teacher's tokens of another clip for each.

    Returns:
        What `spread` gives, and the "clip_correlation" of each clip, which is how much of its
        relations another clip's do not have. It is no bound: relations with less of what all clips
        share can have a higher one.
    """
    relations = Relations(teacher)
    shared = relations.correlation(Relations(others))
    return spread(relations) | {"clip_correlation": (1 - shared).tolist()}


def next_clips(grid: TokenGrid, which: slice) -> TokenGrid:
    """The tokens of the clip after each of these; the first follows the last."""
    count = len(grid.tokens)
    return grid.with_tokens(grid.tokens[[(n + 1) % count for n in range(count)[which]]])


def spread(relations: Relations) -> dict[str, list[float]]:
    """Measure the mean and the spread of each clip's relations.

    Returns:
        A value for each clip, for "relation_mean" and "relation_spread", their standard deviation.
    """
    deviation = relations.variance.clamp(min=0).sqrt()
    return {"relation_mean": relations.mean().tolist(), "relation_spread": deviation.tolist()}


def mean_over_clips(
    measure: str,
    values: Sequence[float],
    teacher: str,
    source: str,
    block: int | None = None,
    noise: float | None = None,
) -> Measurement:
    """Average a measure over clips.

    Args:
        values: One for each clip.

    Raises:
        UserError: A value is not finite.
    """
    place = source if block is None else f"block {block} at noise {noise:g}"
    check_finite(f"The features of {place}", np.asarray(values))
    low, high = paired_bootstrap([[value] for value in values])
    return Measurement(
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
