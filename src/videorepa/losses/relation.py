"""Token Relation Distillation: the student's token-to-token similarities follow the teacher's.

VideoREPA (arXiv 2505.23656), section 4.2 and equation 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from videorepa.losses import Loss, check_same_grid, unit_tokens
from videorepa.tokens import TokenGrid

if TYPE_CHECKING:
    from videorepa.encoders import EncoderSpec


class Relation(Loss):
    """Mean over pairs of tokens of how far student and teacher similarity differ past a margin.

    margin: similarities within it count as equal; 0 to 2. A recipe that leaves it out gets the
        one that was published for its encoder.
    scope: "all" pairs of a clip, pairs within one frame ("space"), or across frames ("time").
    weighting: "joint" takes one mean over all pairs, as the published code does; "equal" adds the
        mean over space and the mean over time, as the paper's equation 5 does. Only for "all".
    hinge: relu(|d| - margin) as in the published code; without it |d| where |d| >= margin, as in
        the paper.
    """

    name: Literal["relation"] = "relation"
    margin: float = Field(default=0.1, ge=0.0, le=2.0)
    scope: Literal["all", "space", "time"] = "all"
    weighting: Literal["joint", "equal"] = "joint"
    hinge: bool = True

    def taught_by(self, encoder: EncoderSpec | None) -> Relation:
        if encoder is None or "margin" in self.model_fields_set:
            return self
        return self.model_copy(update={"margin": encoder.relation_margin})

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        with torch.autocast(student.tokens.device.type, enabled=False):
            ours = unit_tokens(student).flatten(2, 3)
            theirs = unit_tokens(teacher).detach().flatten(2, 3)
            batch, frames, tokens, _ = ours.shape
            pairs_in_space = batch * frames * tokens**2
            if self.scope == "space":
                return self._sum(ours, theirs) / pairs_in_space
            in_all = self._sum(ours.flatten(1, 2), theirs.flatten(1, 2))
            if self.scope == "all" and self.weighting == "joint":
                return in_all / (pairs_in_space * frames)
            in_space = self._sum(ours, theirs)
            # A single frame has no pairs across time, and then no loss from them.
            in_time = (in_all - in_space) / max(1, pairs_in_space * (frames - 1))
            return in_time if self.scope == "time" else in_space / pairs_in_space + in_time

    def _sum(self, a: Float[Tensor, "... n d"], b: Float[Tensor, "... n e"]) -> Float[Tensor, ""]:
        distance = (a @ a.mT - b @ b.mT).abs()
        if self.hinge:
            return (distance - self.margin).relu().sum()
        return torch.where(distance >= self.margin, distance, 0.0).sum()
