"""Measures how well plain colours, and the true state, predict contact.

Run: python experiments/contact.py [--clips 1000]

A linear probe reads the clips of `videorepa.world.contact`. Prints the AUC with its 95 % interval;
guessing gives 0.5.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from auc import read_label
from videorepa.probing.sources import SLICES
from videorepa.world.contact import LAST_SHOWN, MIDDLE, RED, YELLOW, contact_clip
from videorepa.world.render import Clip

GRID = 8


def colours(clip: Clip, frames: Sequence[int]) -> np.ndarray:
    """Mean colours of these frames on a GRID x GRID grid."""
    shown = clip.frames[list(frames)].astype(np.float32)
    side = shown.shape[1] // GRID
    return shown.reshape(len(shown), GRID, side, GRID, side, 3).mean((2, 4)).ravel()


def steps(clip: Clip) -> np.ndarray:
    """Mean colours of evenly spaced pairs of frames, as many as the probe takes."""
    firsts = 1 + 2 * np.linspace(0, LAST_SHOWN // 2 - 1, SLICES).round().astype(int)
    pairs = [colours(clip, (first, first + 1)).reshape(2, -1).mean(0) for first in firsts]
    return np.concatenate(pairs)


def truth(clip: Clip, *, moving: bool) -> np.ndarray:
    """Positions of the red and the yellow object in the last frame, and their sizes.

    Args:
        moving: Add their velocities at the start and at the end.
    """
    at = clip.trajectory.positions[:, [RED, YELLOW]]
    sizes = [body.area**0.5 for body in clip.scene.bodies[:2]]
    state = [at[-1].ravel(), np.ravel(sizes)]
    if moving:
        state += [(at[1] - at[0]).ravel(), (at[-1] - at[-2]).ravel()]
    return np.concatenate(state)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1000)
    count = parser.parse_args().clips
    clips, answers = zip(*(contact_clip(0, index) for index in range(count)), strict=True)
    inputs = {
        f"colours on {GRID} x {GRID}, first frame": lambda clip: colours(clip, [0]),
        "middle frame": lambda clip: colours(clip, [MIDDLE]),
        "last frame": lambda clip: colours(clip, [LAST_SHOWN]),
        f"{SLICES} steps of two frames": steps,
        "true positions and sizes, last frame": lambda clip: truth(clip, moving=False),
        "and true velocities, start and end": lambda clip: truth(clip, moving=True),
    }
    for name, features in inputs.items():
        readout = read_label(np.stack([features(clip) for clip in clips]), np.array(answers))
        print(f"{name:40} {readout.auc:.3f} [{readout.low:.3f}, {readout.high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
