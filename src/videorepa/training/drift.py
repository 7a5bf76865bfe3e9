"""Does the model drift? What clips look like while it is trained, against the base model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from videorepa.system.progress import console

REC_709 = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""How much red, green and blue count in luma."""


class Look(NamedTuple):
    """What a clip looks like, in four numbers; each is a mean over its frames.

    Luma is Rec. 709's weighted sum of the pixels as stored (gamma-encoded), 0 to 1.

    saturation: mean of HSV's S = (max - min) / max of a pixel's channels, 0 (grey) to 1.
    contrast: RMS contrast, the standard deviation of luma within a frame, 0 to 0.5.
    sharpness: root mean square of the luma's gradient (differences to the next pixel down and
        across), divided by the frame's contrast, per pixel: so it does not change when contrast
        does. A sine wave across with a period of p pixels has 2 sin(pi / p). 0 for a flat frame.
    motion: mean absolute change of luma from a frame to the next, 0 to 1; 0 for a single frame.
    """

    saturation: float
    contrast: float
    sharpness: float
    motion: float


def look(clip: np.ndarray) -> Look:
    """Measure a clip (F, H, W, 3) uint8 RGB, with H and W of 2 pixels or more.

    One frame at a time, so that a full-size clip needs little memory. Raises ValueError for
    another shape or dtype.
    """
    if clip.dtype != np.uint8 or clip.ndim != 4 or clip.shape[-1] != 3 or min(clip.shape) < 1:
        raise ValueError(f"the clip is {clip.dtype} {clip.shape}; expected uint8 (F, H, W, 3)")
    saturations, contrasts, sharpnesses, motions = [], [], [], [0.0]
    before = None
    for frame in clip:
        pixels = frame.astype(np.float32) / 255.0
        brightest, darkest = pixels.max(-1), pixels.min(-1)
        saturations.append(((brightest - darkest) / np.maximum(brightest, 1 / 255)).mean())
        luma = pixels @ REC_709
        contrast = luma.std(dtype=np.float64)
        down, across = luma[1:, :-1] - luma[:-1, :-1], luma[:-1, 1:] - luma[:-1, :-1]
        gradient = np.sqrt(np.mean(down**2 + across**2, dtype=np.float64))
        contrasts.append(contrast)
        # A flat frame's luma still differs by rounding.
        sharpnesses.append(gradient / contrast if contrast > 1e-6 else 0.0)
        if before is not None:
            motions.append(np.abs(luma - before).mean())
        before = luma
    moves = motions[1:] or motions
    return Look(*(float(np.mean(each)) for each in (saturations, contrasts, sharpnesses, moves)))


class Drift:
    """Compares clips with the base model's of the same prompts and seeds.

    base: the base model's clips. band: how far a ratio to the base may be from 1, both ways.
    """

    def __init__(self, base: Sequence[Look], band: float) -> None:
        self.base, self.band = base, band
        self.warned: set[str] = set()

    def __call__(self, step: int, clips: Sequence[Look]) -> dict[str, float]:
        """What is logged of a step's clips, in the order of the base's. For each quantity:

        drift_saturation: the clips' mean, as a multiple of the base's mean, and for several clips
        drift_saturation_low and _high: the lowest and highest of 1 + (clip - its base) / mean of
            the base, whose mean over the clips is the ratio. They are the spread.
        drift_outside: how many of the quantities have left the band.

        A quantity that is 0 in all of the base's clips has no ratio and is left out. The first time
        that a quantity leaves the band, the console says so.
        """
        logged: dict[str, float] = {}
        outside = 0
        for name, ours, theirs in zip(
            Look._fields, np.transpose(clips), np.transpose(self.base), strict=True
        ):
            if not theirs.mean() > 0:
                continue
            each = 1 + (ours - theirs) / theirs.mean()
            ratio, low, high = float(each.mean()), float(each.min()), float(each.max())
            logged[f"drift_{name}"] = ratio
            if len(each) > 1:
                logged |= {f"drift_{name}_low": low, f"drift_{name}_high": high}
            if abs(ratio - 1) > self.band:
                outside += 1
                self._warn(step, name, ours.mean(), theirs.mean(), each)
        return logged | {"drift_outside": outside}

    def _warn(self, step: int, name: str, ours: float, theirs: float, each: np.ndarray) -> None:
        if name in self.warned:
            return
        self.warned.add(name)
        spread = f", clip by clip {each.min():.2f} to {each.max():.2f}" if len(each) > 1 else ""
        console.print(
            f"warning: step {step}: the {name} of the validation clips is {ours:.3g}, "
            f"{each.mean():.2f} times the base model's {theirs:.3g} at the same seeds{spread}; the "
            f"band is {1 - self.band:.2f} to {1 + self.band:.2f}. Look at the clips in samples. If "
            "this is not what the training is for: lower optim.learning_rate or align.weight, end "
            "the alignment early (align.when.until), or average the weights (train.ema). If it is, "
            "widen validation.drift.",
            style="yellow",
            markup=False,
            highlight=False,
        )
