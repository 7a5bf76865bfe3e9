"""Projects a student's tokens to the teacher's width and grid."""

from __future__ import annotations

from typing import Literal

from torch import nn

from videorepa.align.resampling import resample
from videorepa.tokens import TokenGrid

PROJECTOR_FILE = "projector.safetensors"
"""The file, in the folder that `import_weights` wrote, with the weights of a `Projector`."""


class Projector(nn.Module):
    """VideoREPA's projector: a three-layer MLP on each token, then `resample`.

    VideoREPA (arXiv 2505.23656), section 4: Linear SiLU Linear SiLU Linear, then `resample` with a
    learned Conv2d whose kernel and stride are the ratio of the two grids: 3 x 3 at the published
    size, and no convolution where the ratio is 1 x 1, as in REPA. The projector lives beside the
    diffusion transformer, so an export leaves it behind.

    Args:
      student_width: Channels of a student token.
      teacher_width: Channels of a teacher token.
      hidden: Width of the MLP's hidden layers.
      ratio: Student rows and columns for each of the teacher's.
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
        """Make the projector for two grids, whose ratio is rounded to whole numbers from 1 on."""
        return cls(student.width, teacher.width, hidden, _ratio(student, teacher))

    def forward(self, student: TokenGrid, like: TokenGrid) -> TokenGrid:
        """Project the student's tokens to the teacher's width, on the grid of `like`."""
        return resample(self.on_own_grid(student.since(like.start)), like, self.conv)

    def on_own_grid(self, student: TokenGrid) -> TokenGrid:
        """Project the student's tokens to the teacher's width, and leave them in their places."""
        return student.with_tokens(self.mlp(student.tokens))


class ConvProjector(nn.Module):
    """iREPA's projector (arXiv 2512.10794): a 3 x 3 convolution on each frame, then `resample`."""

    def __init__(
        self, student_width: int, teacher_width: int, ratio: tuple[int, int] = (1, 1)
    ) -> None:
        super().__init__()
        self.widen = nn.Conv2d(student_width, teacher_width, kernel_size=3, padding=1)
        self.conv = _to_grid(teacher_width, ratio)

    def forward(self, student: TokenGrid, like: TokenGrid) -> TokenGrid:
        return resample(self.on_own_grid(student.since(like.start)), like, self.conv)

    def on_own_grid(self, student: TokenGrid) -> TokenGrid:
        """Project the student's tokens to the teacher's width, and leave them in their places."""
        return student.convolved(self.widen, *student.size[1:])


class NoProjector(nn.Module):
    """Applies `resample` alone, and leaves the student's width as it is.

    Relation losses compare grids of any widths; losses that compare token by token refuse two.
    """

    def forward(self, student: TokenGrid, like: TokenGrid) -> TokenGrid:
        return resample(student, like)


def projector_between(
    kind: Literal["mlp", "conv", "none"], student: TokenGrid, teacher: TokenGrid, hidden: int
) -> nn.Module:
    """Make the projector of a kind for two grids.

    Args:
      kind: "mlp" (`Projector`), "conv" (`ConvProjector`) or "none" (`NoProjector`).
      student: The student's grid; only its shape counts.
      teacher: The grid to project to; only its shape counts.
      hidden: Width of the MLP's hidden layers.
    """
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
