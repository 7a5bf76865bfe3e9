"""Brings a student to a teacher: taps a block, projects its tokens, meets the teacher's grid."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.tokens import TokenGrid


class Tapped:
    """Holds what a block gave in the latest forward pass."""

    def __init__(self) -> None:
        self._output: Any = None

    def take(self) -> Any:
        """The block's output, once. Raises RuntimeError if the block has not run since."""
        if self._output is None:
            raise RuntimeError("The tapped block has not run since its output was last taken.")
        output, self._output = self._output, None
        return output


@contextmanager
def tap(block: nn.Module) -> Iterator[Tapped]:
    """Keep the output of `block`, gradient and all, for as long as the context lasts.

    A forward hook on the unmodified module; of several passes the latest counts. Activation
    checkpointing runs the block once more during the backward pass; that output has no part in the
    loss and is not kept.
    """
    tapped = Tapped()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not in_backward():
            tapped._output = output

    handle = block.register_forward_hook(keep)
    try:
        yield tapped
    finally:
        handle.remove()


def in_backward() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs blocks again."""
    return torch._C._current_graph_task_id() != -1


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


def meeting(student: TokenGrid, teacher: TokenGrid, interpolate: Side = "student") -> TokenGrid:
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
