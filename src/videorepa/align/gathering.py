"""Puts the tokens of clips together, of which several processes hold a part each."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, distributed


class Gathering:
    """The processes that share the tokens of each clip, in order; by default one has all of them.

    All of them compute the same losses of the whole tokens, and each gets the gradient of the sum
    of these losses. So gradients that are averaged over the processes are those of one process.

    Args:
      group: The processes' group.
      count: How many they are.
    """

    def __init__(self, group: Any = None, count: int = 1) -> None:
        self.group, self.count = group, count

    def whole(self, part: Any) -> Any:
        """Give the tokens of all processes, (B, N, D), for a part of them, (B, N / count, D).

        What a single process has is given back, whatever it is.
        """
        return part if self.count == 1 else _Whole.apply(part, self)

    def gradient(self, part: Tensor) -> Tensor:
        """Give one loss's gradient at what `whole` gave, for the gradient at what it was given."""
        return part if self.count == 1 else self.joined(part) / self.count

    def joined(self, part: Float[Tensor, "b n d"]) -> Float[Tensor, "b m d"]:
        """Give all processes' parts, one after the other, without a gradient."""
        parts = [torch.empty_like(part) for _ in range(self.count)]
        distributed.all_gather(parts, part.contiguous(), group=self.group)
        return torch.cat(parts, 1)


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, part: Tensor, gathering: Gathering) -> Tensor:
        ctx.gathering = gathering
        return gathering.joined(part)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        count, group = ctx.gathering.count, ctx.gathering.group
        return gradient.chunk(count, 1)[distributed.get_rank(group)] * count, None
