"""How close two token grids are: relation error and linear CKA."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.align.resampling import resample
from videorepa.losses.relation import Relation
from videorepa.tokens import TokenGrid

SMALLEST_SHARE = 1e-6
"""What float32 leaves of features that do not vary, as a share of their norm, is below this."""


# Two grids.


def linear_cka(x: Float[Tensor, "n p"], y: Float[Tensor, "n q"]) -> Float[Tensor, ""]:
    """Linear CKA of the same n tokens in two models, 0 to 1 (Kornblith et al. 2019,
    arXiv 1905.00414): |Y'X|^2 / (|X'X| |Y'Y|), with X and Y centred over the tokens.

    It is 1 for features that are equal up to a rotation, a scale and an offset, and 0 where either
    does not vary. Unrelated features of a width near the number of tokens are well above 0, so a
    straw man has to stand beside it. Computed in float32 or wider.
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
    """Without the mean token, at norm 1: the fourth powers in CKA must not overflow. Zero if no
    more than rounding is left."""
    x = x if x.dtype == torch.float64 else x.float()
    varying = x - x.mean(0)
    length = varying.norm()
    return torch.where(length > SMALLEST_SHARE * x.norm(), varying / length, 0.0)


def closeness(student: TokenGrid, teacher: TokenGrid) -> dict[str, list[float]]:
    """Relation error and CKA of each clip, on the teacher's grid; there is no projector, since
    neither depends on the width.

    The relation error is TRD with margin 0: the mean, over all pairs of a clip's tokens, of how far
    apart the two cosine similarities are; 0 to 2.
    """
    found: dict[str, list[float]] = {"relation_error": [], "cka": []}
    # Clip by clip: relations of the published grid take 52 MB for each.
    for ours, theirs in zip(student.tokens.split(1), teacher.tokens.split(1), strict=True):
        like = teacher.with_tokens(theirs.to(ours.device, torch.float32))
        met = resample(student.with_tokens(ours.float()), like=like)
        found["relation_error"].append(Relation(margin=0.0)(met, like).item())
        found["cka"].append(linear_cka(met.tokens.flatten(0, 3), like.tokens.flatten(0, 3)).item())
    return found
