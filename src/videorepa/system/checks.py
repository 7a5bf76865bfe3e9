"""Checks that several verbs make, each with advice on what to do when it fails."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from videorepa.errors import UserError
from videorepa.system.weights import Misfit


def check_shard(shard: tuple[int, int]) -> None:
    """Raise UserError unless the shard (i, n) is one of n, counted from 0."""
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"The shard {index}/{count} does not exist; give i/n with 0 <= i < n.")


def check_finite(
    what: str,
    *values: Tensor | np.ndarray,
    advice: str = "The weights are damaged, or the precision is too low: try --train.precision "
    "float32.",
) -> None:
    """Raise UserError, with the name `what` (in the plural), if any value is not finite."""
    if not all(torch.as_tensor(value).isfinite().all() for value in values):
        raise UserError(f"{what} are not finite. {advice}")


def check_shapes(
    what: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]], advice: str
) -> None:
    """Raise UserError, saying how `what` (a plural) differs, unless names and shapes are right."""
    if misfit := Misfit.between(tensors, expected):
        raise UserError(f"{what} are not as expected; {misfit}. {advice}")


def finite_number(value: object) -> float | None:
    """What JSON holds as a float, or None unless it is a number that a float can be."""
    try:
        number = float(value) if isinstance(value, int | float) else math.nan
    except OverflowError:
        return None
    return number if math.isfinite(number) else None
