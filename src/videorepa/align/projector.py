"""Brings a student to a teacher: taps a block, projects its tokens, meets the teacher's grid."""

from __future__ import annotations

from typing import Literal

from torch import nn

from videorepa.align.resampling import resample
from videorepa.tokens import TokenGrid


class Projector(nn.Module):
    """The student's tokens to the teacher's width, by a three-layer MLP, and then to its grid.

    VideoREPA, section 4: Linear SiLU Linear SiLU Linear, then `resample` with a learned Conv2d
    whose kernel and stride are the ratio of the two grids (3 x 3 at the published size; no
    convolution where it is 1 x 1, as in REPA). It lives beside the diffusion transformer and is
    left behind when that is exported.
    """

    def __init__(
        self,
        student_width: int,
        teacher_width: int,
        hidden: int = 2048,
        ratio: tuple[int, int] = (3, 3),
    ) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(student_width, hidden),
            nn.SiLU(),
            nn.Linear(hidden, hidden),
            nn.SiLU(),
            nn.Linear(hidden, teacher_width),
        )
        self.conv = _to_grid(teacher_width, ratio)

    @classmethod
    def between(cls, student: TokenGrid, teacher: TokenGrid, hidden: int = 2048) -> Projector:
        """The projector for two grids; their ratio is rounded to whole steps, at least 1."""
        return cls(student.width, teacher.width, hidden, _ratio(student, teacher))

    def forward(self, student: TokenGrid, like: TokenGrid) -> TokenGrid:
        student = student.since(like.start)
        return resample(student.with_tokens(self.mlp(student.tokens)), like, self.conv)


class ConvProjector(nn.Module):
    """iREPA's (arXiv 2512.10794): a 3 x 3 convolution on each frame in place of the MLP."""

    def __init__(
        self, student_width: int, teacher_width: int, ratio: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.widen = nn.Conv2d(student_width, teacher_width, kernel_size=3, padding=1)
        self.conv = _to_grid(teacher_width, ratio)

    def forward(self, student: TokenGrid, like: TokenGrid) -> TokenGrid:
        student = student.since(like.start)
        return resample(student.convolved(self.widen, *student.size[1:]), like, self.conv)


class NoProjector(nn.Module):
    """Only resampling, for two grids of one width."""

    def forward(self, student: TokenGrid, like: TokenGrid) -> TokenGrid:
        return resample(student, like)


def projector_between(
    kind: Literal["mlp", "conv", "none"], student: TokenGrid, teacher: TokenGrid, hidden: int
) -> nn.Module:
    """The projector of that kind for two grids; hidden is the MLP's."""
    if kind == "mlp":
        return Projector.between(student, teacher, hidden)
    if kind == "conv":
        return ConvProjector(student.width, teacher.width, _ratio(student, teacher))
    return NoProjector()


def _ratio(student: TokenGrid, teacher: TokenGrid) -> tuple[int, int]:
    (_, sh, sw), (_, th, tw) = student.size, teacher.size
    return max(1, round(sh / th)), max(1, round(sw / tw))


def _to_grid(width: int, ratio: tuple[int, int]) -> nn.Conv2d | None:
    if ratio == (1, 1):
        return None
    return nn.Conv2d(width, width, kernel_size=ratio, stride=ratio)
