"""Brings one token grid to another's places in time and space."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.tokens import TokenGrid


def resample(student: TokenGrid, like: TokenGrid, spatial: nn.Conv2d | None = None) -> TokenGrid:
    """The student's tokens on the grid of `like`.

    Steps that see frames before the first of `like` are dropped (VideoREPA drops CogVideoX's first
    latent frame); time is interpolated linearly; then each frame goes through `spatial`, or is
    interpolated bilinearly without one. Both steps are linear and act on different axes, so where
    time is stretched the spatial one goes first: the result is the same and there is less to do.
    """
    student = student.since(like.start)
    _, height, width = like.size

    def in_space(grid: TokenGrid) -> TokenGrid:
        return (
            grid.at_size(height, width)
            if spatial is None
            else grid.convolved(spatial, height, width)
        )

    if student.size[0] < like.size[0]:
        return in_space(student).at_times_of(like)
    return in_space(student.at_times_of(like))


Side = Literal["student", "teacher", "teacher_in_space", "teacher_in_time"]


def common_grid(student: TokenGrid, teacher: TokenGrid, interpolate: Side = "student") -> TokenGrid:
    """The grid on which the two are compared; its tokens are on the meta device.

    interpolate: the side that is brought to the other's grid. The four are the rows of VideoREPA's
    ablation: the student's (published), the teacher's, or the teacher's rows and columns alone
    (then time is the teacher's), or its steps alone. Raises UserError if the two share no frame.
    """
    student = student.since(teacher.start)
    in_time = student if interpolate in ("teacher", "teacher_in_time") else teacher
    in_space = student if interpolate in ("teacher", "teacher_in_space") else teacher
    size = (1, in_time.size[0], *in_space.size[1:], teacher.width)
    met = TokenGrid(torch.empty(size, device="meta"), in_time.start, in_time.stride)
    # Neither side may be asked for frames that it has not seen.
    resample(student.on_meta(), met)
    resample(teacher.on_meta(), met)
    return met


@torch.no_grad()
def centred_similarity(student: TokenGrid, teacher: TokenGrid) -> Tensor:
    """Mean cosine of student and teacher relations after taking each clip's mean token away.

    Raw cosines against a video teacher start near 0.9 even for a constant prediction, because the
    teacher's tokens share a large mean; without it, 0 means unrelated and 1 the same geometry.
    """

    def relations(tokens: Float[Tensor, "b t h w d"]) -> Float[Tensor, "b n n"]:
        flat = tokens.float().flatten(1, 3)
        flat = nn.functional.normalize(flat - flat.mean(1, keepdim=True), dim=-1)
        # Up to 256 tokens, evenly spaced, are enough for a number in a log.
        flat = flat[:, :: max(1, flat.shape[1] // 256)]
        return flat @ flat.transpose(1, 2)

    a, b = relations(student.tokens).flatten(1), relations(teacher.tokens).flatten(1)
    return nn.functional.cosine_similarity(a, b, dim=1).mean()
