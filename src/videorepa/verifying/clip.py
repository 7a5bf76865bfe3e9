"""The clip that models are shown: a simulated one, the same on every machine."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import UInt8
from torch.nn import functional as F

from videorepa.settings.sections import ClipSize

SEED, NUMBER = 77, 0


def simulated(size: ClipSize) -> tuple[UInt8[np.ndarray, "t h w 3"], str]:
    """A simulated clip of a size, and its caption."""
    from videorepa.world.render import make_clip

    clip = make_clip(SEED, NUMBER, frames=size.frames)
    pixels = torch.from_numpy(clip.frames).movedim(-1, 1).float()
    resized = F.interpolate(pixels, (size.height, size.width), mode="bilinear")
    return resized.round().clamp(0, 255).byte().movedim(1, -1).numpy(), clip.caption
