"""SARA: relations follow the teacher's where something salient has a part in them."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.errors import UserError
from videorepa.losses import Loss, check_same_grid, unit_tokens
from videorepa.losses._relations import every_pair, relation_distance
from videorepa.tokens import TokenGrid


class Sara(Loss):
    """Weighted mean over pairs of tokens of |dS|, per clip, then the mean over clips.

    dS is the difference of student and teacher similarity. A pair weighs
    W_ij = w_i + w_j - w_i w_j, with w the saliency of a token from 0 to 1: the weight is 1 as soon
    as one of the two is fully salient. A clip without any salient token has no loss.

    saliency: "teacher" reads it from the teacher's grid. "change" has no parameters: how far a
        teacher token's direction is from the mean over time at its place, divided by the clip's
        maximum.
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
                "The loss `sara` with `saliency: teacher` needs an encoder that says how salient "
                f"each token is; the teacher's grid {teacher} does not. Choose another encoder or "
                "`saliency: change`, which needs nothing."
            )
        return teacher.saliency
