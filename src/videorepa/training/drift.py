"""Measures how far a training's validation clips drift from the base model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from videorepa.system.progress import console

REC_709 = np.array([0.2126, 0.7152, 0.0722], np.float32)
"""The weights of red, green and blue in luma."""


class Appearance(NamedTuple):
    """Four numbers for what a clip looks like, each a mean over its frames.

    Luma is Rec. 709's weighted sum of the pixels as stored (gamma-encoded), 0 to 1.

    Attributes:
      saturation: Mean over the pixels of HSV's S = (max - min) / max, 0 (grey) to 1.
      contrast: RMS contrast: the standard deviation of luma within a frame, 0 to 0.5.
      sharpness: The root mean square of luma's gradient (differences to the next pixel down and
        across), divided by the frame's contrast, so that it does not change when contrast does. A
        horizontal sine wave with a period of p pixels has 2 sin(pi / p), a flat frame 0.
      motion: Mean absolute change of luma from one frame to the next, 0 to 1; 0 for one frame.
    """

    saturation: float
    contrast: float
    sharpness: float
    motion: float


def appearance(clip: np.ndarray) -> Appearance:
    """Measure a clip, one frame at a time, so that a full-size clip needs little memory.

    Args:
      clip: (F, H, W, 3) uint8 RGB, with H and W of 2 pixels or more.

    Raises:
      ValueError: The clip has another shape or dtype.
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
    changes = motions[1:] or motions
    measured = (saturations, contrasts, sharpnesses, changes)
    return Appearance(*(float(np.mean(values)) for values in measured))


class Drift:
    """Compares clips with the base model's clips of the same prompts and seeds.

    Args:
      base: The base model's clips.
      band: How far a ratio to the base may be from 1, both ways.
    """

    def __init__(self, base: Sequence[Appearance], band: float) -> None:
        self.base, self.band = base, band
        self.warned: set[str] = set()

    def __call__(self, step: int, clips: Sequence[Appearance]) -> dict[str, float]:
        """Compare a step's clips, and warn the first time that a quantity leaves the band.

        A quantity that is 0 in all of the base's clips has no ratio and is left out.

        Args:
          step: For the warning.
          clips: In the order of the base's.

        Returns:
          For the log, `drift_saturation` and so on: the clips' mean, as a multiple of the base's
          mean. For several clips also their spread, `drift_saturation_low` and `_high`: the
          extremes of 1 + (clip - its base) / mean of the base, whose mean is the ratio. Last,
          `drift_outside`: how many quantities are outside the band.
        """
        logged: dict[str, float] = {}
        outside = 0
        for name, ours, theirs in zip(
            Appearance._fields, np.transpose(clips), np.transpose(self.base), strict=True
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
            "this is not what the training is for: lower optim.learning_rate or align.weight, or "
            "end the alignment early (align.when.until). If it is, widen validation.drift.",
            style="yellow",
        )
