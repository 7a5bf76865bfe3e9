"""Words numbers and names for reports and messages."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable

NAMES = {"sa": "SA", "pc": "PC", "vq": "VQ"}

SHOWN = 80
"""Most characters of a value that a message shows."""

BEYOND_CHANCE = 0.05
"""A difference counts as beyond chance if its p, corrected by Holm's method, is below this."""


def label(metric: str) -> str:
    """Write a metric's name as readers know it, such as "SA mean" for "sa_mean"."""
    return " ".join(NAMES.get(word, word) for word in metric.replace("_", " ").split())


def number(value: float | None, digits: int = 1, sign: bool = False) -> str:
    """Write a number with a true minus, or a dash for None and for numbers that are not finite."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:{'+' if sign else ''}.{digits}f}".replace("-", "−")


def probability(p: float | None) -> str:
    return "< 0.001" if p is not None and p < 0.001 else number(p, 3)


def count(how_many: int, noun: str) -> str:
    return f"{how_many} {noun}{'' if how_many == 1 else 's'}"


def listed(names: Iterable[str]) -> str:
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def shown(value: object) -> str:
    """Write a value as Python does, cut to 80 characters without writing out all of it."""
    return _short.repr(value)[:SHOWN]


_short = reprlib.Repr()
_short.maxstring = _short.maxother = _short.maxlong = SHOWN
_short.maxlevel = 3
