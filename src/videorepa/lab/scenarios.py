"""The kinds of clip the lab knows: each draws a scene, with its caption, from a random generator.

The function's name is the scenario's name; what a check has to find in a clip stands in the scene.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from videorepa.lab.world import COLOURS, FLOOR, GRAVITY, SIZE, Ball, Scene, Screen

Rng = np.random.Generator


def _colours(rng: Rng, count: int) -> list[str]:
    return [str(name) for name in rng.permutation(list(COLOURS))[:count]]


def _pick(rng: Rng, templates: Sequence[str], **words: str) -> str:
    return templates[int(rng.integers(len(templates)))].format(**words)


def _heading(rng: Rng) -> tuple[int, str]:
    sign = 1 if rng.random() < 0.5 else -1
    return sign, "right" if sign > 0 else "left"


def fall(rng: Rng) -> Scene:
    """One ball is let go in the air, falls and bounces."""
    (colour,) = _colours(rng, 1)
    radius = rng.uniform(5, 8)
    position = (rng.uniform(12, SIZE - 12), rng.uniform(radius + 2, 26))
    velocity = (rng.uniform(-0.6, 0.6), 0.0)
    caption = _pick(
        rng,
        (
            "A {c} ball falls and bounces on the floor.",
            "A {c} ball drops to the floor and bounces.",
        ),
        c=colour,
    )
    ball = Ball(colour, radius, position, velocity, rng.uniform(0.6, 0.85))
    return Scene("fall", caption, (ball,))


def throw(rng: Rng) -> Scene:
    """One ball flies across in an arc."""
    (colour,) = _colours(rng, 1)
    radius = rng.uniform(5, 7)
    sign, side = _heading(rng)
    start_x = rng.uniform(6, 14)
    position = (start_x if sign > 0 else SIZE - start_x, rng.uniform(30, 44))
    # Kept under the frame's top edge: rise = v^2 / 2g.
    rise = rng.uniform(0.6, 0.95) * (position[1] - radius - 1)
    velocity = (sign * rng.uniform(1.8, 3.0), -float(np.sqrt(2 * GRAVITY * rise)))
    caption = _pick(
        rng,
        ("A {c} ball flies through the air to the {s}.", "A {c} ball is thrown to the {s}."),
        c=colour,
        s=side,
    )
    return Scene("throw", caption, (Ball(colour, radius, position, velocity, 0.6),))


def roll(rng: Rng) -> Scene:
    """One ball rolls along the floor."""
    (colour,) = _colours(rng, 1)
    radius = rng.uniform(5, 8)
    sign, side = _heading(rng)
    start_x = rng.uniform(6, 14)
    position = (start_x if sign > 0 else SIZE - start_x, FLOOR - radius)
    velocity = (sign * rng.uniform(1.4, 2.8), 0.0)
    caption = _pick(
        rng,
        ("A {c} ball rolls to the {s}.", "A {c} ball rolls along the floor to the {s}."),
        c=colour,
        s=side,
    )
    return Scene("roll", caption, (Ball(colour, radius, position, velocity),))


def collide(rng: Rng) -> Scene:
    """One ball rolls into another that lies still."""
    first, second = _colours(rng, 2)
    sign, side = _heading(rng)
    r1, r2 = rng.uniform(5, 7.5, 2)
    start_x = rng.uniform(7, 12)
    target_x = rng.uniform(32, 40)
    mirror = (lambda x: x) if sign > 0 else (lambda x: SIZE - x)
    balls = (
        Ball(first, r1, (mirror(start_x), FLOOR - r1), (sign * rng.uniform(2.0, 3.2), 0.0), 0.9),
        Ball(second, r2, (mirror(target_x), FLOOR - r2), (0.0, 0.0), 0.9),
    )
    caption = _pick(
        rng,
        (
            "A {a} ball rolls to the {s} and hits a {b} ball.",
            "A {a} ball rolls to the {s} into a {b} ball.",
        ),
        a=first,
        b=second,
        s=side,
    )
    return Scene("collide", caption, balls)


def hide(rng: Rng) -> Scene:
    """One ball rolls behind a screen and comes out again."""
    (colour,) = _colours(rng, 1)
    radius = rng.uniform(4.5, 6)
    sign, side = _heading(rng)
    start_x = rng.uniform(5, 9)
    position = (start_x if sign > 0 else SIZE - start_x, FLOOR - radius)
    centre, width = rng.uniform(28, 36), rng.uniform(14, 18)
    velocity = (sign * rng.uniform(2.6, 3.4), 0.0)
    caption = _pick(
        rng,
        (
            "A {c} ball rolls to the {s} behind a gray screen.",
            "A {c} ball passes behind a gray screen to the {s}.",
        ),
        c=colour,
        s=side,
    )
    screen = Screen(centre - width / 2, centre + width / 2, rng.uniform(28, 34))
    return Scene("hide", caption, (Ball(colour, radius, position, velocity),), screen)


SCENARIOS: dict[str, Callable[[Rng], Scene]] = {
    scenario.__name__: scenario for scenario in (fall, throw, roll, collide, hide)
}
