"""Compares the pairwise similarities of two sets of tokens without holding all pairs at once.

The relation of two tokens is the cosine of the angle between them. A clip of N tokens has N x N
relations, and a plain implementation holds several matrices of that size for its backward pass.
Here they are computed in tiles that fit a cache. The matrices are symmetric, so a tile beside the
diagonal is computed once and counted twice. The gradient is formed from the same tile as the value,
so the backward pass is one multiplication. A clip takes 4 N^2 D operations instead of 8 N^2 D, and
memory for the gradient and a few tiles.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch._C import _autograd
from torch.utils.flop_counter import register_flop_formula

SMALLEST_NORM = 1e-6

TILE = {"cpu": 640}
"""Most tokens along a tile's side, by device type: two float32 tiles take 3 MB."""

TILE_ELSEWHERE = 2048
"""The same for other devices. It should give a GPU enough work per product; not measured."""


def unit_length(
    tokens: Float[Tensor, "*n d"],
) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n 1"]]:
    """The tokens divided by their lengths, and the lengths.

    A token shorter than 1e-6 has no reliable direction, and its gradient would be of the order of
    one over its length. Its length counts as infinite, so it becomes zero and gets no gradient.
    """
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    length = torch.where(norm > SMALLEST_NORM, norm, torch.inf)
    return tokens / length, length


def every_pair(frames: int, places: int) -> Float[Tensor, "t t"]:
    """Weights of `relation_distance` for the mean over all pairs of a clip's tokens.

    Args:
      frames: Frames (steps in time) of the grid.
      places: Tokens in a frame.
    """
    return torch.full((frames, frames), 1 / (frames * places) ** 2, dtype=torch.float64)


def pairs_in_space(frames: int, places: int) -> Float[Tensor, "t t"]:
    """Weights for the mean over pairs of tokens within one frame; see `every_pair`."""
    return torch.eye(frames, dtype=torch.float64) / (frames * places**2)


def pairs_in_time(frames: int, places: int) -> Float[Tensor, "t t"]:
    """Weights for the mean over pairs of tokens of different frames; all 0 for a single frame."""
    across = 1 - torch.eye(frames, dtype=torch.float64)
    return across / max(1, frames * (frames - 1) * places**2)


def relation_distance(
    student: Float[Tensor, "b t *place d"],
    teacher: Float[Tensor, "b t *place e"],
    pairs: Float[Tensor, "t t"],
    distance: Literal["hinge", "threshold", "squared"] = "hinge",
    margin: float = 0.0,
    saliency: Float[Tensor, "b t *place"] | None = None,
) -> Float[Tensor, " b"]:
    """The distance of the student's relations from the teacher's, for each clip.

    With d_ij = cos(s_i, s_j) - cos(t_i, t_j), it is

        sum over i, j of pairs[f(i), f(j)] * W_ij * rho(d_ij),

    where f(i) is the frame of token i. It is computed in float32, or float64 for float64 tokens,
    under autocast too, since half precision gives NaN. The gradient reaches the student alone and
    cannot be differentiated again.

    Args:
      student: The student's tokens.
      teacher: The teacher's tokens, in the same places; their width may differ.
      pairs: Symmetric weights of pairs by their frames, with the normalisation included, as from
        `every_pair`, `pairs_in_space` or `pairs_in_time`. Tiles whose weights are 0 cost nothing.
      distance: "hinge" is rho(d) = relu(|d| - margin), "threshold" is |d| where |d| >= margin and
        0 elsewhere, "squared" is d^2 and has no margin.
      margin: Differences up to it are ignored, 0 to 2.
      saliency: w, from 0 to 1, with W_ij = w_i + w_j - w_i w_j. Without it W is 1.
    """
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    with torch.autocast(student.device.type, enabled=False):
        values, _ = _values_and_gradient(
            student, teacher.detach(), pairs, distance, margin, saliency, with_gradient
        )
    return values


# A custom operator, so that torch.compile takes it as one step and does not unroll its loops.
@torch.library.custom_op(
    "videorepa::relation_distance",
    mutates_args=(),
    schema="(Tensor student, Tensor teacher, Tensor pairs, str distance, float margin, "
    "Tensor? saliency, bool with_gradient) -> (Tensor, Tensor)",
)
def _values_and_gradient(
    student: Float[Tensor, "b t *place d"],
    teacher: Float[Tensor, "b t *place e"],
    pairs: Float[Tensor, "t t"],
    distance: str,
    margin: float,
    saliency: Float[Tensor, "b t *place"] | None,
    with_gradient: bool,
) -> tuple[Float[Tensor, " b"], Tensor]:
    """The distance of each clip, and its gradient with respect to the student's tokens."""
    values, gradient = _outputs(student, teacher, pairs, distance, margin, saliency, with_gradient)
    clips, frames, *places = student.shape[:-1]
    if pairs.shape != (frames, frames) or not torch.equal(pairs, pairs.mT):
        raise ValueError(
            f"The weights of pairs of {frames} frames are a symmetric {frames} x {frames} matrix; "
            f"got one of {tuple(pairs.shape)}, or one that is not symmetric."
        )
    side = TILE.get(student.device.type, TILE_ELSEWHERE)
    # Small clips share a tile; large ones go one by one.
    together = max(1, (side // (frames * math.prod(places))) ** 2)
    for first in range(0, clips, together):
        some = slice(first, first + together)
        _walk(
            values[some],
            gradient[some].flatten(1, -2) if with_gradient else None,
            student[some].flatten(1, -2),
            teacher[some].flatten(1, -2),
            None if saliency is None else saliency[some].flatten(1),
            pairs.cpu(),
            side,
            distance,
            margin,
        )
    return values, gradient


@_values_and_gradient.register_fake
def _outputs(student, teacher, pairs, distance, margin, saliency, with_gradient):
    dtype = torch.promote_types(student.dtype, teacher.dtype)
    dtype = torch.promote_types(dtype, torch.float32)
    values = student.new_zeros(student.shape[0], dtype=dtype)
    return values, student.new_zeros(student.shape if with_gradient else (0,), dtype=dtype)


def _keep_gradient(ctx, inputs, output) -> None:
    ctx.set_materialize_grads(False)
    ctx.student_dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _scale_gradient(ctx, by: Tensor | None, of_gradient: Tensor | None):
    if of_gradient is not None:
        raise RuntimeError("The gradient of a relation distance cannot be differentiated again.")
    (gradient,) = ctx.saved_tensors
    if by is not None:
        by = by.view(-1, *[1] * (gradient.dim() - 1))
        # In place, unless the graph is kept for another backward pass.
        kept = _autograd._get_current_graph_task_keep_graph()  # pyright: ignore
        gradient = gradient * by if kept else gradient.mul_(by)
        # Round last: the small unscaled numbers would vanish in half precision.
        by = gradient.to(ctx.student_dtype)
    return by, None, None, None, None, None, None


_values_and_gradient.register_autograd(_scale_gradient, setup_context=_keep_gradient)


@register_flop_formula(torch.ops.videorepa.relation_distance)
def _operations(student, teacher, *options, out_shape, **_) -> int:
    """Half of each symmetric matrix, and the gradient from all slopes: an upper bound, reached
    where all pairs count."""
    clips, *places, width = student
    with_gradient = math.prod(out_shape[1]) > 0
    each = width + teacher[-1] + (2 * width if with_gradient else 0)
    return clips * math.prod(places) ** 2 * each


def _walk(
    values: Float[Tensor, " b"],
    gradient: Float[Tensor, "b n d"] | None,
    student: Float[Tensor, "b n d"],
    teacher: Float[Tensor, "b n e"],
    saliency: Float[Tensor, "b n"] | None,
    pairs: Float[Tensor, "t t"],
    side: int,
    distance: str,
    margin: float,
) -> None:
    """Add the distances to `values` and their gradient to `gradient`, tile by tile."""

    def unit(tokens: Tensor, run: slice) -> Tensor:
        # Recomputed for every tile: it costs little beside the products and saves a copy.
        return unit_length(tokens[:, run].to(values.dtype))[0]

    places = student.shape[1] // len(pairs)
    runs = _runs(pairs, places, side)
    longest = max(run.stop - run.start for _, run in runs)
    scratch = values.new_empty(2, len(values) * longest**2)
    for number, (frames_i, i) in enumerate(runs):
        s_i, t_i = unit(student, i), unit(teacher, i)
        for frames_j, j in runs[number:]:
            weight = pairs[frames_i, frames_j]
            if not weight.any():
                continue
            beside_diagonal = i != j
            s_j, t_j = (unit(student, j), unit(teacher, j)) if beside_diagonal else (s_i, t_i)
            tile = len(values), i.stop - i.start, j.stop - j.start
            d, amount = (part[: math.prod(tile)].view(tile) for part in scratch)
            # Two products instead of one of twice the width: equal features then differ by exactly
            # zero and not by rounding, whose sign would become the gradient.
            torch.bmm(s_i, s_j.mT, out=d)
            d.sub_(torch.bmm(t_i, t_j.mT, out=amount))
            degree = RHO[distance](d, amount, margin)
            factor = weight[0, 0].item()
            if (weight != factor).any():
                factor = 1.0
                by_frames = d.view(len(values), len(weight), places, -1, places)
                by_frames.mul_(weight.to(d)[:, None, :, None])
            if saliency is not None:
                w_i, w_j = (saliency[:, run].to(values.dtype) for run in (i, j))
                d.mul_(1 - (1 - w_i)[:, :, None] * (1 - w_j)[:, None])
            values.add_(amount.mul_(d).sum((1, 2)), alpha=factor * (1 + beside_diagonal))
            if gradient is not None:
                gradient[:, i].baddbmm_(d, s_j, alpha=2 * degree * factor)
                if beside_diagonal:
                    gradient[:, j].baddbmm_(d.mT, s_i, alpha=2 * degree * factor)
    if gradient is not None:
        for _, run in runs:
            # A move along itself changes a token's length and no relation.
            s, length = unit_length(student[:, run].to(values.dtype))
            along = torch.linalg.vecdot(gradient[:, run], s).unsqueeze(-1)
            gradient[:, run].addcmul_(along, s, value=-1).div_(length)


def _runs(pairs: Float[Tensor, "t t"], places: int, side: int) -> list[tuple[slice, slice]]:
    """Cut a clip into runs of tokens, each whole frames or part of one, as (frames, tokens).

    Where only pairs within a frame count, each frame has runs of its own, so that no other tiles
    are computed.
    """
    alone = torch.equal(pairs, pairs.diag().diag())
    step = 1 if alone else max(1, side // places)
    runs = []
    for frame in range(0, len(pairs), step):
        frames = slice(frame, min(frame + step, len(pairs)))
        end = frames.stop * places
        for token in range(frame * places, end, side):
            runs.append((frames, slice(token, min(token + side, end))))
    return runs


# Each of these replaces a tile's differences d by slopes and fills `amount`, such that rho(d) is
# amount * slope. It returns the degree of rho, such that rho'(d) is degree * slope.


def _hinge(d: Tensor, amount: Tensor, margin: float) -> int:
    torch.ops.aten.softshrink.out(d, margin, out=amount)
    torch.sign(amount, out=d)
    return 1


def _threshold(d: Tensor, amount: Tensor, margin: float) -> int:
    torch.ge(torch.abs(d, out=amount), margin, out=amount).mul_(d)
    torch.sign(amount, out=d)
    return 1


def _squared(d: Tensor, amount: Tensor, margin: float) -> int:
    amount.copy_(d)
    return 2


RHO = {"hinge": _hinge, "threshold": _threshold, "squared": _squared}
