"""Which clips each step sees: a function of the seed and the step alone."""

from __future__ import annotations

from functools import lru_cache

import torch

from videorepa.system.randomness import generator


def sample_numbers(
    step: int, micro: int, rank: int, world: int, batch: int, accumulate: int
) -> range:
    """Give the numbers of one micro-batch's samples, counted over the whole training.

    A step has the same samples however many processes and micro-batches share it.

    Args:
      step: From 0.
      micro: The micro-batch's number within the step, from 0.
      rank: This process's number, from 0.
      world: The number of processes.
      batch: Samples in a micro-batch.
      accumulate: Micro-batches in a step.
    """
    first = step * world * accumulate * batch + (micro * world + rank) * batch
    return range(first, first + batch)


def clip_index(seed: int, number: int, clips: int) -> int:
    """Give the index of a sample's clip among `clips`.

    Each epoch uses every clip once, in an order of its own.
    """
    epoch, position = divmod(number, clips)
    return _order(seed, epoch, clips)[position]


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, clips: int) -> list[int]:
    return torch.randperm(clips, generator=generator(seed, "order", epoch)).tolist()
