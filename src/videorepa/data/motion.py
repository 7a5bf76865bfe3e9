"""How much a clip moves, by the plainest measure: how far its neighbouring frames are apart."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8


def motion(frames: UInt8[np.ndarray, "f h w 3"]) -> float:
    """The mean distance of neighbouring frames, two or more, in levels of 255."""
    pairs = zip(frames[:-1], frames[1:], strict=True)
    return float(np.mean([np.abs(a.astype(np.int16) - b).mean() for a, b in pairs]))
