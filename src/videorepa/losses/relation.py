"""Token Relation Distillation: the student's pairwise token similarities follow the teacher's.

VideoREPA (arXiv 2505.23656), section 4.2 and equation 5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field
from torch import Tensor

from videorepa.losses import (
    Loss,
    check_same_grid,
    every_pair,
    pairs_in_space,
    pairs_in_time,
    relation_distance,
)
from videorepa.tokens import TokenGrid

if TYPE_CHECKING:
    from videorepa.encoders import EncoderSpec


class Relation(Loss):
    """VideoREPA's TRD. With dS = S_student - S_teacher, the differences of all pairs' cosines,

        loss = mean over pairs of relu(|dS| - margin).

    Args:
      margin: Differences up to it count as 0; 0 to 2. A recipe that leaves it out gets the margin
        that was published for its encoder.
      scope: "all" pairs of a clip, pairs within a frame ("space"), or across frames ("time").
      weighting: "joint" takes one mean over all pairs, as the published code does. "equal" adds
        the mean over space and the mean over time, as equation 5 does. Only for scope "all".
      hinge: relu(|dS| - margin), as in the published code. Without it |dS| where
        |dS| >= margin, as in the paper.
    """

    name: Literal["relation"] = "relation"
    margin: float = Field(default=0.1, ge=0.0, le=2.0)
    scope: Literal["all", "space", "time"] = "all"
    weighting: Literal["joint", "equal"] = "joint"
    hinge: bool = True

    def taught_by(self, encoder: EncoderSpec | None) -> Relation:
        if encoder is None or "margin" in self.model_fields_set:
            return self
        return self.derived(margin=encoder.relation_margin)

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        frames, height, width = teacher.size
        places = height * width
        if self.scope == "all" and self.weighting == "joint":
            pairs = every_pair(frames, places)
        elif self.scope == "all":
            pairs = pairs_in_space(frames, places) + pairs_in_time(frames, places)
        elif self.scope == "space":
            pairs = pairs_in_space(frames, places)
        else:
            pairs = pairs_in_time(frames, places)
        distance = "hinge" if self.hinge else "threshold"
        return relation_distance(
            student.tokens, teacher.tokens, pairs, distance, self.margin
        ).mean()
