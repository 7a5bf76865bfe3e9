"""Which clips each step sees, and with which noise: a function of the seed and the step alone."""

from __future__ import annotations

import hashlib
from functools import lru_cache

import torch


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


def generator(seed: int, *what: str | int) -> torch.Generator:
    """A CPU generator that depends on nothing but its arguments."""
    return torch.Generator().manual_seed(stable_seed(seed, *what))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """Seed of torch's global generator for a step (dropout), or for the start, -1 (weights)."""
    return generator(seed, "step", step, rank).initial_seed()


def stable_seed(*what: str | int) -> int:
    """A 63-bit seed from any words and numbers, the same on every machine."""
    text = "\x1f".join(str(part) for part in what)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
