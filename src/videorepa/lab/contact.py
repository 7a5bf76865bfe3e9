"""Clips of two balls of which one reaches the other just in time or just too late.

They ask Physion's question (object contact prediction, arXiv 2106.08261) of the lab's world. What
`collide` draws always ends in contact, so it cannot be asked there.
"""

from __future__ import annotations

import numpy as np

from videorepa.lab.render import Clip, render
from videorepa.lab.world import COLOURS, FLOOR, SIZE, Ball, Scene, simulate

TOUCHING = (12.0, 15.5)
"""Frames until the balls meet, from and to, where they do; a clip's last frame is number 16."""
MISSING = (16.5, 20.0)
"""The same where the clip ends before they meet: a gap of half a pixel to 7 pixels is left then."""


def contact_clip(seed: int, index: int) -> tuple[Clip, bool]:
    """Clip number `index` of the series that `seed` names, and whether its balls have touched by
    its end: those of even numbers have, those of odd ones have not.

    One ball rolls along the floor towards another that lies still. Where they start is drawn alike
    for both answers; what tells them apart is the speed over the gap.
    """
    rng = np.random.default_rng([seed, index])
    touches = index % 2 == 0
    first, second = (str(name) for name in rng.permutation(list(COLOURS))[:2])
    r1, r2 = rng.uniform(5, 7, 2)
    gap = rng.uniform(14, 34)
    speed = gap / rng.uniform(*(TOUCHING if touches else MISSING))
    start = r1 + rng.uniform(1, SIZE - 2 * (r1 + r2) - gap - 1)
    target = start + r1 + gap + r2
    if rng.random() < 0.5:
        start, target, speed = SIZE - start, SIZE - target, -speed
    balls = (
        Ball(first, r1, (start, FLOOR - r1), (speed, 0.0), 0.9),
        Ball(second, r2, (target, FLOOR - r2), (0.0, 0.0), 0.9),
    )
    scene = Scene("contact", "", balls)
    trajectory = simulate(scene)
    return Clip(render(scene, trajectory), scene, trajectory), bool(trajectory.contact[-1])
