"""High dynamic range to the standard one: pictures in PQ or HLG (ITU-R BT.2100) as BT.709 shows
them."""

from __future__ import annotations

from functools import cache

import numpy as np
from jaxtyping import UInt8, UInt16

PQ, HLG = 16, 18
"""The numbers that H.264, HEVC and ffmpeg give to the two transfer curves."""

WHITE_NITS = 203.0
"""Luminance of white paper in a graded picture (ITU-R BT.2408); it becomes white."""

HLG_NITS = 1000.0
"""Peak of the display that HLG is shown on, the nominal one."""

KNEE = 0.9
"""Share of white's luminance from which on highlights are compressed."""

GAMMA = 2.4
"""Of the display that BT.709 is graded on (ITU-R BT.1886)."""

LUMA = np.array([0.2627, 0.6780, 0.0593], np.float32)
"""Weights of BT.2020's red, green and blue in luminance."""

TO_BT709 = np.array(
    [[1.660491, -0.587641, -0.072850], [-0.124550, 1.132900, -0.008349],
     [-0.018151, -0.100579, 1.118730]],
    np.float32,
)  # fmt: skip
"""Linear BT.2020 to linear BT.709 (ITU-R BT.2087)."""


def to_sdr(signal: UInt16[np.ndarray, "h w 3"], transfer: int) -> UInt8[np.ndarray, "h w 3"]:
    """Map a picture to BT.709.

    What is darker than KNEE of white keeps its luminance, hue and saturation. Above, the largest
    of red, green and blue nears 1 exponentially, and the other two are scaled alike, which keeps
    the hue. Colours that BT.709 lacks are cut off at its edge.

    Args:
        signal: BT.2020 RGB in full range, 0 to 65535.
        transfer: PQ or HLG.
    """
    linear = _curve(transfer)[signal]
    if transfer == HLG:
        # The display's own curve, which HLG leaves to it (BT.2100's OOTF).
        linear *= np.maximum(linear @ LUMA, 1e-9)[..., None] ** np.float32(0.2)
        linear *= HLG_NITS / WHITE_NITS
    linear = linear @ TO_BT709.T
    largest = linear.max(-1, keepdims=True)
    above = np.maximum(largest, KNEE)
    linear *= (1 - (1 - KNEE) * np.exp((KNEE - above) / (1 - KNEE))) / above
    return (np.clip(linear, 0, 1) ** np.float32(1 / GAMMA) * 255 + 0.5).astype(np.uint8)


@cache
def _curve(transfer: int) -> np.ndarray:
    """The light of each of the signal's 65,536 values: the display's for PQ, 1 at white; the
    scene's for HLG, 1 at the peak."""
    signal = np.arange(1 << 16) / 0xFFFF
    if transfer == HLG:
        high = (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        light = np.where(signal <= 0.5, signal**2 / 3, high)
    else:
        power = signal ** (32 / 2523)
        share = np.maximum(power - 107 / 128, 0) / (2413 / 128 - 2392 / 128 * power)
        light = 10_000 * share ** (8192 / 1305) / WHITE_NITS
    return light.astype(np.float32)
