"""Which clips each step sees, and with which noise: a function of the seed and the step alone."""

from __future__ import annotations

from functools import lru_cache

import torch

from videorepa.system.randomness import generator


def sample_numbers(
    step: int, micro: int, rank: int, world: int, batch: int, accumulate: int
) -> range:
    """Numbers, counted over the whole training, of the samples of one micro-batch on one rank.

    They are the same set for a step however many ranks and micro-batches share it.
    """
    first = step * world * accumulate * batch + (micro * world + rank) * batch
    return range(first, first + batch)


def clip_index(seed: int, number: int, clips: int) -> int:
    """The clip that a sample uses: every clip once an epoch, in an order drawn for each epoch."""
    epoch, place = divmod(number, clips)
    return _order(seed, epoch, clips)[place]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, clips: int) -> list[int]:
    return torch.randperm(clips, generator=generator(seed, "order", epoch)).tolist()
