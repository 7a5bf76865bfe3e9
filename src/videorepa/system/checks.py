"""Checks that several verbs make, each with advice on what to do when it fails."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from videorepa.errors import UserError


def check_shard(shard: tuple[int, int]) -> None:
    """Raise UserError unless the shard (i, n) is one of n, counted from 0."""
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"The shard {index}/{count} does not exist; give i/n with 0 <= i < n.")


def check_finite(what: str, *values: Tensor | np.ndarray) -> None:
    """Raise UserError, with the name `what` (in the plural), if any value is not finite."""
    if not all(torch.as_tensor(value).isfinite().all() for value in values):
        raise UserError(
            f"{what} are not finite. The weights are damaged, or the precision is too low: try "
            "--train.precision float32."
        )
