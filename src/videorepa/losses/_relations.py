"""Compares how two sets of tokens relate, exactly, without ever holding all pairs of tokens.

The relation of two tokens is the cosine of the angle between them. A clip of N tokens has N x N of
them, and a plain implementation holds several matrices of that size for its backward pass.
Here they come and go in tiles that fit a cache. The matrices are symmetric, so a tile beside the
diagonal is computed once and counted twice; and the gradient is formed along with the value, from
the same tile, so that the backward pass is one multiplication. That takes 4 N^2 D operations a
clip in place of 8 N^2 D, and no memory but for the gradient and a few tiles.
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
"""Tokens along a tile's side, at most, on a type of device: two tiles of float32 take 3 MB."""

TILE_ELSEWHERE = 2048
"""Should be enough work in one product for a GPU; not measured on one."""


def unit_length(
    tokens: Float[Tensor, "*n d"],
) -> tuple[Float[Tensor, "*n d"], Float[Tensor, "*n 1"]]:
    """The tokens divided by their lengths, and the lengths.

    A token shorter than 1e-6 has no direction to speak of: its length counts as infinite, so it
    becomes zero and gets no gradient, which would be of the order of one over its length.
    """
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True)
    length = torch.where(norm > SMALLEST_NORM, norm, torch.inf)
    return tokens / length, length


def every_pair(frames: int, places: int) -> Float[Tensor, "t t"]:
    """Weights for the mean over all pairs of tokens of a clip with so many places in a frame."""
    return torch.full((frames, frames), 1 / (frames * places) ** 2, dtype=torch.float64)


def pairs_in_space(frames: int, places: int) -> Float[Tensor, "t t"]:
    """Weights for the mean over pairs of tokens of one frame."""
    return torch.eye(frames, dtype=torch.float64) / (frames * places**2)


def pairs_in_time(frames: int, places: int) -> Float[Tensor, "t t"]:
    """Weights for the mean over pairs of tokens of different frames; a single frame has none."""
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
    """How far the student's relations are from the teacher's, for each clip.

    With S and T the cosines of all pairs of tokens of student and teacher and d = S - T, this is
    the sum over all tokens i in frame f and j in frame g of pairs[f, g] * W_ij * rho(d_ij).

    pairs: symmetric; what two tokens count by the frames they are in, normalisation included
        (`every_pair`, `pairs_in_space`, `pairs_in_time`). Tiles that count nothing cost nothing.
    distance: rho is relu(|d| - margin) ("hinge"), |d| where |d| >= margin ("threshold"), or d^2
        ("squared", which knows no margin).
    saliency: w, from 0 to 1, for W_ij = w_i + w_j - w_i w_j; without it W is 1.

    Computed in float32, or float64 if tokens are, whatever autocast says: half precision gives NaN
    here. The gradient reaches the student alone and cannot be differentiated again.
    """
    with_gradient = torch.is_grad_enabled() and student.requires_grad
    with torch.autocast(student.device.type, enabled=False):
        values, _ = _values_and_gradient(
            student, teacher.detach(), pairs, distance, margin, saliency, with_gradient
        )
    return values


# An operator of its own, so that torch.compile takes it as one step and does not unroll its loops.
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
    # As many clips at once as fit a tile, of large clips one.
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
        # Rounded last: in half precision the small numbers of before would vanish.
        by = gradient.to(ctx.student_dtype)
    return by, None, None, None, None, None, None


_values_and_gradient.register_autograd(_scale_gradient, setup_context=_keep_gradient)


@register_flop_formula(torch.ops.videorepa.relation_distance)
def _operations(student, teacher, *options, out_shape, **_) -> int:
    """Half of each symmetric matrix, and the gradient from all slopes; where only some pairs
    count there are fewer."""
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
    """Adds the distances to `values` and their gradient to `gradient`, tile by tile."""

    def unit(tokens: Tensor, run: slice) -> Tensor:
        # Again for every tile: that is little beside its products, and needs no copy of them all.
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
            # One after the other, and not as one product of twice the width: so equal features
            # differ by zero and not by rounding, whose sign would be their gradient.
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
            # Moving along itself, a token changes its length and no relation.
            s, length = unit_length(student[:, run].to(values.dtype))
            along = torch.linalg.vecdot(gradient[:, run], s).unsqueeze(-1)
            gradient[:, run].addcmul_(along, s, value=-1).div_(length)


def _runs(pairs: Float[Tensor, "t t"], places: int, side: int) -> list[tuple[slice, slice]]:
    """Cuts a clip into runs of tokens, each whole frames or part of one, as (frames, tokens).

    Frames that count only by themselves are kept apart, so that only their tiles are computed.
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


# Each replaces the differences d of a tile by slopes, and fills `amount`, so that rho is amount
# times slope. It returns the degree of rho: the slope times the degree is rho's derivative.


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
