"""Optical flow of two frames."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from videorepa.errors import UserError

Flow = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""Maps two grey frames (h, w) to each pixel's displacement from the first to the second, (2, h, w):
down, and right."""


def flow_method() -> Flow:
    """Give scikit-image's TV-L1 (Zach, Pock and Bischof 2007). Raises UserError without it."""
    try:
        from skimage.registration import optical_flow_tvl1
    except ImportError:
        raise UserError(
            "Optical flow needs scikit-image, which is not installed: "
            "pip install 'videorepa[flow]'."
        ) from None

    def flow(first: np.ndarray, second: np.ndarray) -> np.ndarray:
        # The library's default attachment lets an object's motion spread over a flat background.
        return optical_flow_tvl1(first, second, attachment=100, tightness=0.1)

    return flow
