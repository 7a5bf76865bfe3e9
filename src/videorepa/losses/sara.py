"""SARA: relations follow the teacher's where either token is salient (arXiv 2605.07800)."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.errors import UserError
from videorepa.losses import Loss, check_same_grid, every_pair, relation_distance, unit_tokens
from videorepa.tokens import TokenGrid


class Sara(Loss):
    """A saliency-weighted relation loss. With dS = S_student - S_teacher, the mean over clips of

        sum over pairs of W_ij |dS_ij| / sum over pairs of W_ij,  W_ij = w_i + w_j - w_i w_j.

    w is the saliency of a token, 0 to 1, so a pair weighs 1 where either token is fully salient. A
    clip without any salient token has a loss of 0.

    Args:
      saliency: "teacher" reads w from the teacher's grid. "change" needs no trained part: w is the
        distance of a teacher token's direction from its place's mean over time, divided by the
        clip's maximum.
    """

    name: Literal["sara"] = "sara"
    saliency: Literal["teacher", "change"] = "change"

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        saliency = self._saliency(teacher).detach()
        frames, height, width = teacher.size
        distance = relation_distance(
            student.tokens,
            teacher.tokens,
            every_pair(frames, height * width),
            saliency=saliency,
        )
        # W_ij = 1 - (1 - w_i)(1 - w_j), so its mean over all pairs comes from that of 1 - w.
        weight = 1 - (1 - saliency.to(distance.dtype)).flatten(1).mean(1).square()
        return (distance / torch.where(weight > 0, weight, torch.inf)).mean()

    def _saliency(self, teacher: TokenGrid) -> Float[Tensor, "b t h w"]:
        if self.saliency == "change":
            changes = TokenGrid(unit_tokens(teacher)).changes()
            assert changes.saliency is not None
            return changes.saliency
        if teacher.saliency is None:
            raise UserError(
                "The loss `sara` with `saliency: teacher` needs an encoder that gives a saliency "
                f"of each token; the teacher's grid {teacher} has none. Choose another encoder or "
                "`saliency: change`, which works with any."
            )
        return teacher.saliency
