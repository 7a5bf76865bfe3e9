"""Seeds and generators that depend on their arguments alone."""

from __future__ import annotations

import hashlib

import torch


def generator(seed: int, *what: str | int) -> torch.Generator:
    """Make a CPU generator whose seed depends on the arguments alone."""
    return torch.Generator().manual_seed(stable_seed(seed, *what))


def step_seed(seed: int, step: int, rank: int = 0) -> int:
    """The seed of torch's global generator at a step (for dropout), or at -1 (for new weights)."""
    return generator(seed, "step", step, rank).initial_seed()


def stable_seed(*what: str | int) -> int:
    """A 63-bit seed from any words and numbers, the same on every machine."""
    text = "\x1f".join(str(part) for part in what)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
