"""Local Gram Flow: where a token's look-alikes are in the next frame, as the teacher has it.

SAM2VideoX, "Structure From Tracking" (arXiv 2512.11792).
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor
from torch.nn import functional as F

from videorepa.errors import UserError
from videorepa.losses import Loss, check_same_grid, unit_tokens
from videorepa.tokens import TokenGrid

NOWHERE = -1e4
"""The logarithm of the probability of a place beyond the frame's edge: its exponential is 0."""


class LocalGramFlow(Loss):
    """How tokens move into the next step. For a token at the place p and the places q in a window
    around p, let A(p, q) = cos(x_f(p), x_{f+1}(q)). With A_s of the student and A_y of the teacher,

        loss = mean over steps f and places p of KL(softmax_q(A_y / T) || softmax_q(A_s / T)).

    The constants and the divergence are those of public notes and code; the paper's own text was
    not read. There, A_y is the mean of two runs of SAM 2, on the clip and on its reverse, which
    would take a second pass of the teacher; here it is that of the clip as it runs. Places beyond
    the frame's edge are left out; public code counts them with a cosine of 0.

    Args:
      window: k, the rows and columns of the window, an odd number.
      temperature: T.
    """

    name: Literal["local_gram_flow"] = "local_gram_flow"
    window: int = Field(default=7, ge=3, le=63)
    temperature: float = Field(default=0.1, gt=0.0)

    @field_validator("window")
    @classmethod
    def _has_a_centre(cls, window: int) -> int:
        if window % 2 == 0:
            raise ValueError("a window around a token has an odd number of rows and columns")
        return window

    def __call__(self, student: TokenGrid, teacher: TokenGrid) -> Tensor:
        check_same_grid(student, teacher)
        if student.size[0] < 2:
            raise UserError(
                "The loss `local_gram_flow` compares a step with the next one, and the two sides "
                f"are compared on {student}, which has one. Give both more frames."
            )
        with torch.autocast(student.tokens.device.type, enabled=False):
            ours = self._flow(unit_tokens(student))
            theirs = self._flow(unit_tokens(teacher).detach())
            return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1).mean()

    def _flow(self, unit: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b t-1 h w places"]:
        """The logarithm of the probability of each place that a token may have moved to."""
        _, _, rows, columns, _ = unit.shape
        edge = self.window // 2
        after = F.pad(unit[:, 1:], (0, 0, edge, edge, edge, edge))
        inside = F.pad(unit.new_ones(rows, columns), (edge,) * 4)
        flow = []
        for down in range(self.window):
            for right in range(self.window):
                window = slice(down, down + rows), slice(right, right + columns)
                alike = torch.linalg.vecdot(unit[:, :-1], after[:, :, *window]) / self.temperature
                flow.append(torch.where(inside[window] > 0, alike, NOWHERE))
        return torch.stack(flow, -1).log_softmax(-1)
