"""Brings one token grid to another's positions in time and space."""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.tokens import TokenGrid


def resample(student: TokenGrid, like: TokenGrid, spatial: nn.Conv2d | None = None) -> TokenGrid:
    """Bring the student's tokens to the grid of `like`.

    Steps that cover frames before the first of `like` are dropped, as VideoREPA drops CogVideoX's
    first latent frame: its teacher sees frames from 1 on. Time is interpolated linearly. Each frame
    then goes through `spatial`. Where time is stretched, space goes first. That is less work for
    the same result, since the two operations are linear and act on different axes.

    Args:
      student: The grid to resample.
      like: The grid whose steps, rows and columns to take; only its shape counts.
      spatial: Maps each frame to the rows and columns of `like`. Without it, frames are
        interpolated bilinearly.

    Raises:
      UserError: The two grids share no frame.
    """
    student = student.since(like.start)
    _, height, width = like.size

    def in_space(grid: TokenGrid) -> TokenGrid:
        if spatial is None:
            return grid.at_size(height, width)
        return grid.convolved(spatial, height, width)

    if student.size[0] < like.size[0]:
        return in_space(student).at_times_of(like)
    return in_space(student.at_times_of(like))


InterpolatedSide = Literal["student", "teacher", "teacher_in_space", "teacher_in_time"]


def common_grid(
    student: TokenGrid, teacher: TokenGrid, interpolate: InterpolatedSide = "student"
) -> TokenGrid:
    """Choose the grid on which student and teacher are compared, with tokens on the meta device.

    Args:
      student: The student's grid; only its shape counts.
      teacher: The teacher's grid; only its shape counts.
      interpolate: The side that is brought to the other's grid; the four rows of VideoREPA's
        ablation. "student" (published) gives the teacher's grid, "teacher" the student's.
        "teacher_in_space" gives the teacher's steps with the student's rows and columns.
        "teacher_in_time" gives the student's steps with the teacher's rows and columns.

    Raises:
      UserError: The two grids share no frame.
    """
    student = student.since(teacher.start)
    in_time = student if interpolate in ("teacher", "teacher_in_time") else teacher
    in_space = student if interpolate in ("teacher", "teacher_in_space") else teacher
    size = (1, in_time.size[0], *in_space.size[1:], teacher.width)
    common = TokenGrid(torch.empty(size, device="meta"), in_time.start, in_time.stride)
    # Raises if either side has not seen the frames of the common grid.
    resample(student.on_meta(), common)
    resample(teacher.on_meta(), common)
    return common


@torch.no_grad()
def centred_similarity(student: TokenGrid, teacher: TokenGrid) -> Tensor:
    """Measure the mean-centred similarity of two grids of one size.

    Let R hold the cosines of all pairs of a clip's tokens, each minus the clip's mean token. The
    similarity is the mean over clips of cos(R_student, R_teacher): 1 for the same geometry, 0 for
    unrelated ones. Without the mean subtracted, the cosine with a video teacher is near 0.9 even
    for a constant prediction, because the teacher's tokens share a large mean.
    """

    def relations(tokens: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b n n"]:
        flat = tokens.float().flatten(1, 3)
        flat = nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=-1)
        # Some hundred tokens, evenly spaced, are enough for a logged value. A stride that shares no
        # factor with their number comes to all rows and columns.
        count = flat.shape[1]
        stride = next(n for n in range(max(1, count // 256), 0, -1) if math.gcd(n, count) == 1)
        flat = flat[:, ::stride]
        return flat @ flat.transpose(1, 2)

    a, b = relations(student.tokens).flatten(1), relations(teacher.tokens).flatten(1)
    return nn.functional.cosine_similarity(a, b, dim=1).mean()
