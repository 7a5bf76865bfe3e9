"""How well contact is foretold from what is plain to see, and from what a perfect eye would know.

Run: python experiments/contact.py [--clips 1000]

Reads the clips of `videorepa.world.contact` with a linear probe. Prints the AUC and its 95 %
interval; a guess is 0.5.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np

from auc import read_label
from videorepa.probing.sources import SLICES
from videorepa.world.contact import MIDDLE, RED, SHOWN, YELLOW, contact_clip
from videorepa.world.render import Clip

GRID = 8


def colours(clip: Clip, frames: Sequence[int]) -> np.ndarray:
    """Mean colours on GRID x GRID of these frames."""
    shown = clip.frames[list(frames)].astype(np.float32)
    side = shown.shape[1] // GRID
    return shown.reshape(len(shown), GRID, side, GRID, side, 3).mean((2, 4)).ravel()


def steps(clip: Clip) -> np.ndarray:
    """Mean colours of as many steps of two frames as the probe takes, evenly spaced."""
    firsts = 1 + 2 * np.linspace(0, SHOWN // 2 - 1, SLICES).round().astype(int)
    pairs = [colours(clip, (first, first + 1)).reshape(2, -1).mean(0) for first in firsts]
    return np.concatenate(pairs)


def truth(clip: Clip, *, moving: bool) -> np.ndarray:
    """Where the red and the yellow object are in the last frame, and how large; moving: and how
    fast they are at the start and at the end."""
    at = clip.trajectory.positions[:, [RED, YELLOW]]
    sizes = [body.area**0.5 for body in clip.scene.bodies[:2]]
    known = [at[-1].ravel(), np.ravel(sizes)]
    if moving:
        known += [(at[1] - at[0]).ravel(), (at[-1] - at[-2]).ravel()]
    return np.concatenate(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clips", type=int, default=1000)
    count = parser.parse_args().clips
    clips, answers = zip(*(contact_clip(0, index) for index in range(count)), strict=True)
    what = {
        f"colours on {GRID} x {GRID}, first frame": lambda clip: colours(clip, [0]),
        "middle frame": lambda clip: colours(clip, [MIDDLE]),
        "last frame": lambda clip: colours(clip, [SHOWN]),
        f"{SLICES} steps of two frames": steps,
        "true positions and sizes, last frame": lambda clip: truth(clip, moving=False),
        "and true velocities, start and end": lambda clip: truth(clip, moving=True),
    }
    for name, see in what.items():
        found = read_label(np.stack([see(clip) for clip in clips]), np.array(answers))
        print(f"{name:40} {found.auc:.3f} [{found.low:.3f}, {found.high:.3f}]", flush=True)


if __name__ == "__main__":
    main()
