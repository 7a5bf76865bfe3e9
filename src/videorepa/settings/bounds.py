"""The numbers that a setting can have.

A bound lies far above what anybody uses. It refuses slips and nonsense at once, which otherwise run
out of memory hours later, or hang. A field that is bounded further wraps its type once more, as
`Annotated[Side, Field(ge=8)]` does: of `side: Side = Field(ge=8)` pydantic keeps one bound alone.
"""

from __future__ import annotations

import math
from typing import Annotated

from pydantic import Field

Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""What names a series of random numbers."""

Count = Annotated[int, Field(ge=0, le=1_000_000_000)]
"""How many of something there are one after another, such as steps; perhaps none."""

Number = Annotated[Count, Field(ge=1)]
"""How many of something there are one after another, and at least one."""

Clips = Annotated[int, Field(ge=1, le=1_000_000)]
"""How many clips a list has, or prompts."""

AtOnce = Annotated[int, Field(ge=1, le=10_000)]
"""How many of something are in memory at once, or are made of one thing."""

Frames = Annotated[int, Field(ge=1, le=10_000)]
"""The length of a clip."""

Side = Annotated[int, Field(ge=1, le=10_000)]
"""The height or width of a frame, or of a part of it, in pixels."""

Fps = Annotated[int, Field(ge=1, le=1_000)]
"""Frames per second."""

Rate = Annotated[float, Field(gt=0, le=1_000)]
"""Frames per second, which broadcast has in parts, such as 29.97."""

Width = Annotated[int, Field(ge=1, le=16_384)]
"""Channels of a layer, or the rank of an adapter."""

Layers = Annotated[int, Field(ge=1, le=1_000)]
"""Layers of a model, or heads of a layer."""

DenoisingSteps = Annotated[int, Field(ge=1, le=1_000)]
"""Steps of a sampler. Schedulers have 1,000 noise levels."""

Share = Annotated[float, Field(ge=0, le=1)]
"""A part of a whole."""


def is_same_rate(fps: float, other: float) -> bool:
    """Whether two rates are one, but for how broadcast counts seconds: 23.976 and 24."""
    return math.isclose(fps, other, rel_tol=0.01)
