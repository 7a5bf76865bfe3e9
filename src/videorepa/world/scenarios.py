"""The lab's scenarios, each a function of the same name that draws a scene with its caption."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from videorepa.world.simulator import (
    COLOURS,
    FLOOR,
    GRAVITY,
    SIZE,
    Ball,
    Box,
    Look,
    Plank,
    Scene,
    Screen,
)

Split = Literal["within", "beyond"]
"""Whether parameters are within their ranges, or above them: faster, larger, higher. Models are
trained only on "within"."""

CAPTIONS: dict[str, tuple[str, ...]] = {
    "fall": (
        "A {a} ball falls and bounces on the floor.",
        "A {a} ball drops and bounces up again.",
    ),
    "drop": (
        "A {a} ball falls and hardly bounces.",
        "A {a} ball drops and stays on the floor.",
    ),
    "throw": (
        "A {a} ball flies through the air to the {s}.",
        "A {a} ball is thrown to the {s}.",
        "Someone throws a {a} ball to the {s}.",
    ),
    "roll": (
        "A {a} ball rolls to the {s}.",
        "A {a} ball rolls along the floor to the {s}.",
        "On the floor a {a} ball rolls to the {s}.",
    ),
    "slide": (
        "A {a} box slides to the {s} and stops.",
        "A {a} box slides over the floor to the {s} until it stops.",
    ),
    "ramp": (
        "A {a} ball rolls down a ramp to the {s}.",
        "Down a ramp a {a} ball rolls to the {s}.",
        "A {a} ball runs down a slope to the {s}.",
    ),
    "collide": (
        "A {a} ball rolls to the {s} and hits a {b} ball.",
        "A {a} ball rolls to the {s} into a {b} ball.",
        "Rolling to the {s}, a {a} ball bumps into a {b} ball.",
    ),
    "chain": (
        "A {a} ball hits a {b} ball to the {s}, which hits a {c} ball.",
        "A {a} ball rolls to the {s} into a {b} ball and that into a {c} ball.",
    ),
    "stack": (
        "A {a} box tips and falls off a {b} box to the {s}.",
        "A stack of a {a} box on a {b} box falls over to the {s}.",
        "A {a} box topples to the {s} from a {b} box.",
    ),
    "catch": (
        "A {a} ball falls into an open box.",
        "A {a} ball drops into a box and stays there.",
        "An open box catches a {a} ball.",
    ),
    "hide": (
        "A {a} ball rolls to the {s} behind a gray screen.",
        "A {a} ball passes behind a gray screen to the {s}.",
        "Behind a gray screen a {a} ball rolls to the {s}.",
    ),
}
"""Captions of each scenario. a, b and c are the colours of the scene's bodies, in order, and s is
the side towards which they move."""

BYSTANDERS = (
    " A {a} ball lies still.",
    " A {a} box stands still.",
    " A {a} ball lies on a shelf.",
)
"""Sentences that may follow, about a body that plays no part."""


@dataclass(frozen=True)
class Draw:
    """Draws the parameters of a scene at random, within their ranges or beyond them."""

    rng: np.random.Generator
    split: Split = "within"

    def uniform(self, low: float, high: float) -> float:
        """A number whose range is the same in both splits, such as a position."""
        return float(self.rng.uniform(low, high))

    def extent(self, low: float, high: float) -> float:
        """A size, speed or height. Beyond the range it is in (high, high + (high - low) / 2)."""
        if self.split == "beyond":
            low, high = high, high + (high - low) / 2
        return self.uniform(low, high)

    def chance(self, share: float) -> bool:
        """True with a probability."""
        return bool(self.rng.random() < share)

    def colours(self, count: int) -> list[str]:
        """Distinct colours."""
        return [str(name) for name in self.rng.permutation(list(COLOURS))[:count]]

    def caption(self, event: str, *colours: str, side: str = "") -> str:
        templates = CAPTIONS[event]
        template = templates[int(self.rng.integers(len(templates)))]
        return template.format(**dict(zip("abc", colours, strict=False)), s=side)


@dataclass(frozen=True)
class Side:
    """The side towards which things move. Scenes are specified for the right and mirrored for the
    left."""

    sign: int

    @property
    def name(self) -> str:
        return "right" if self.sign > 0 else "left"

    def x(self, x: float) -> float:
        return x if self.sign > 0 else SIZE - x

    def plank(self, x1: float, y1: float, x2: float, y2: float) -> Plank:
        return Plank((self.x(x1), y1), (self.x(x2), y2))

    @staticmethod
    def drawn(draw: Draw) -> Side:
        return Side(1 if draw.chance(0.5) else -1)


def rolling(colour: str, radius: float, x: float, speed: float, elasticity: float = 0.9) -> Ball:
    """A ball on the floor that rolls from the start."""
    return Ball(
        colour=colour,
        radius=radius,
        position=(x, FLOOR - radius),
        velocity=(speed, 0.0),
        spin=speed / radius,
        elasticity=elasticity,
    )


def _bystander(draw: Draw, colour: str, x: float) -> tuple[Ball | Box, str]:
    """A body on the floor that plays no part, and its sentence for the caption."""
    if draw.chance(0.5):
        return rolling(colour, draw.uniform(4.5, 6), x, 0.0), BYSTANDERS[0].format(a=colour)
    width = draw.uniform(6.5, 8)
    height = width * draw.uniform(1.4, 1.7)
    box = Box(colour=colour, width=width, height=height, position=(x, FLOOR - height / 2))
    return box, BYSTANDERS[1].format(a=colour)


def _perhaps_with_shelf(draw: Draw, scene: Scene, colour: str) -> Scene:
    """The scene, with a ball on a shelf and a sentence about it added in 30 % of cases."""
    if not draw.chance(0.3):
        return scene
    x, y, radius = draw.uniform(14, 50), draw.uniform(22, 27), draw.uniform(4.5, 6)
    plank = Plank((x - radius - 2, y), (x + radius + 2, y))
    ball = Ball(colour=colour, radius=radius, position=(x, y - plank.radius - radius))
    caption = scene.caption + BYSTANDERS[2].format(a=colour)
    return replace(scene, caption=caption, bodies=(*scene.bodies, ball), planks=(plank,))


def fall(draw: Draw) -> Scene:
    """A ball is released in the air, falls and bounces."""
    return _let_go(draw, "fall", draw.uniform(0.65, 0.85))


def drop(draw: Draw) -> Scene:
    """A ball is released in the air, falls and hardly bounces."""
    return _let_go(draw, "drop", draw.uniform(0.1, 0.25))


def _let_go(draw: Draw, event: str, elasticity: float) -> Scene:
    colour, other = draw.colours(2)
    radius = draw.extent(5, 7)
    side = Side.drawn(draw)
    x = draw.uniform(14, 30)
    ball = Ball(
        colour=colour,
        radius=radius,
        position=(side.x(x), FLOOR - radius - draw.extent(14, 24)),
        velocity=(draw.uniform(-0.4, 0.4), 0.0),
        elasticity=elasticity,
    )
    caption, bodies = draw.caption(event, colour), (ball,)
    if draw.chance(0.3):
        bystander, sentence = _bystander(draw, other, side.x(draw.uniform(x + 20, 56)))
        caption, bodies = caption + sentence, (ball, bystander)
    return Scene(event, caption, bodies)


def throw(draw: Draw) -> Scene:
    """A ball flies across the frame in an arc."""
    (colour,) = draw.colours(1)
    radius = draw.extent(4.5, 6.5)
    side = Side.drawn(draw)
    y = draw.uniform(32, 44)
    speed = -float(np.sqrt(2 * GRAVITY * draw.extent(9, 18)))
    ball = Ball(
        colour=colour,
        radius=radius,
        position=(side.x(draw.uniform(7, 14)), y),
        velocity=(side.sign * draw.extent(1.6, 2.8), speed),
        elasticity=draw.uniform(0.5, 0.8),
    )
    caption = draw.caption("throw", colour, side=side.name)
    return Scene("throw", caption, (ball,))


def roll(draw: Draw) -> Scene:
    """A ball rolls along the floor, perhaps below another one on a shelf."""
    colour, other = draw.colours(2)
    radius = draw.extent(5, 7)
    side = Side.drawn(draw)
    x = side.x(draw.uniform(7, 14))
    ball = rolling(colour, radius, x, side.sign * draw.extent(1.4, 2.8))
    caption = draw.caption("roll", colour, side=side.name)
    return _perhaps_with_shelf(draw, Scene("roll", caption, (ball,)), other)


def slide(draw: Draw) -> Scene:
    """A box slides along the floor until friction stops it."""
    colour, other = draw.colours(2)
    height = draw.extent(6.5, 8.5)
    width = height * draw.uniform(1.4, 1.8)
    side = Side.drawn(draw)
    speed, time = draw.extent(1.8, 3.2), draw.uniform(9, 13)
    box = Box(
        colour=colour,
        width=width,
        height=height,
        position=(side.x(draw.uniform(8, 14)), FLOOR - height / 2),
        velocity=(side.sign * speed, 0.0),
        elasticity=0.0,
        friction=speed / time / GRAVITY,
    )
    caption = draw.caption("slide", colour, side=side.name)
    return _perhaps_with_shelf(draw, Scene("slide", caption, (box,)), other)


def ramp(draw: Draw) -> Scene:
    """A ball rolls down a ramp and then along the floor."""
    (colour,) = draw.colours(1)
    side = Side.drawn(draw)
    radius = draw.extent(4.5, 6)
    foot, slope = draw.uniform(32, 42), np.radians(draw.extent(20, 30))
    plank = side.plank(0, FLOOR - foot * np.tan(slope), foot, FLOOR)
    ball = on_ramp(colour, radius, side, foot, slope, draw.uniform(17, 24), draw.extent(0.6, 1.6))
    caption = draw.caption("ramp", colour, side=side.name)
    return Scene("ramp", caption, (ball,), (plank,))


def on_ramp(
    colour: str, radius: float, side: Side, foot: float, slope: float, above: float, speed: float
) -> Ball:
    """A ball that rolls down a ramp.

    Args:
        foot: The x at which the ramp reaches the floor.
        slope: Angle of the ramp in radians.
        above: Pixels along the ramp from its foot to where the ball starts.
        speed: Initial speed in pixels per frame.
    """
    along = np.array([np.cos(slope), np.sin(slope)])
    up = np.array([np.sin(slope), -np.cos(slope)])
    x, y = np.array([foot, FLOOR]) - above * along + (radius + Plank.radius) * up
    velocity = speed * along
    return Ball(
        colour=colour,
        radius=radius,
        position=(side.x(float(x)), float(y)),
        velocity=(side.sign * float(velocity[0]), float(velocity[1])),
        spin=side.sign * speed / radius,
        elasticity=0.3,
        friction=1.0,
    )


def collide(draw: Draw) -> Scene:
    """A ball rolls into another that lies still."""
    first, second = draw.colours(2)
    side = Side.drawn(draw)
    balls = (
        rolling(
            first, draw.extent(5, 7), side.x(draw.uniform(8, 12)), side.sign * draw.extent(2.0, 3.0)
        ),
        rolling(second, draw.extent(5, 7), side.x(draw.uniform(32, 40)), 0.0),
    )
    caption = draw.caption("collide", first, second, side=side.name)
    return Scene("collide", caption, balls)


def chain(draw: Draw) -> Scene:
    """A ball hits another, which hits a third."""
    a, b, c = draw.colours(3)
    side = Side.drawn(draw)
    r1, r2, r3 = (draw.extent(4.5, 5.5) for _ in range(3))
    x2 = draw.uniform(23, 27)
    x3 = x2 + r2 + r3 + draw.uniform(4, 7)
    balls = (
        rolling(a, r1, side.x(draw.uniform(6, 9)), side.sign * draw.extent(2.6, 3.4)),
        rolling(b, r2, side.x(x2), 0.0),
        rolling(c, r3, side.x(x3), 0.0),
    )
    caption = draw.caption("chain", a, b, c, side=side.name)
    return Scene("chain", caption, balls)


def stack(draw: Draw) -> Scene:
    """The upper of two boxes overhangs too far, tips and falls."""
    upper, lower = draw.colours(2)
    side = Side.drawn(draw)
    x, width, height = draw.uniform(20, 34), draw.uniform(8, 10), draw.extent(12, 16)
    low = Box(
        colour=lower,
        width=width,
        height=height,
        position=(side.x(x), FLOOR - height / 2),
        elasticity=0.2,
        friction=0.5,
    )
    high = replace(low, colour=upper, width=draw.uniform(12, 14), height=draw.uniform(7, 8.5))
    over = side.x(x + width / 2 + draw.uniform(2, 3.5))
    caption = draw.caption("stack", upper, lower, side=side.name)
    high = replace(high, position=(over, FLOOR - height - high.height / 2))
    return Scene("stack", caption, (high, low))


def catch(draw: Draw) -> Scene:
    """A ball falls into an open box and stays in it."""
    (colour,) = draw.colours(1)
    side = Side.drawn(draw)
    radius = draw.extent(4.5, 6)
    x, inside = draw.uniform(20, 44), 2 * radius + draw.uniform(5, 10)
    left, right, top = x - inside / 2, x + inside / 2, FLOOR - draw.uniform(10, 14)
    ball = Ball(
        colour=colour,
        radius=radius,
        position=(x - side.sign * draw.uniform(2, 4), top - radius - draw.extent(6, 16)),
        velocity=(side.sign * draw.uniform(0.1, 0.4), 0.0),
        elasticity=draw.uniform(0.3, 0.5),
    )
    caption = draw.caption("catch", colour)
    return Scene("catch", caption, (ball,), cup(left, right, top))


def cup(left: float, right: float, top: float) -> tuple[Plank, Plank]:
    """The two sides of an open box on the floor, whose inner edges are at `left` and `right`."""
    return tuple(  # pyright: ignore[reportReturnType]
        Plank((x, top), (x, FLOOR)) for x in (left - Plank.radius, right + Plank.radius)
    )


def hide(draw: Draw) -> Scene:
    """A ball rolls behind a screen and comes out again."""
    (colour,) = draw.colours(1)
    radius = draw.extent(4.5, 6)
    side = Side.drawn(draw)
    centre, width = draw.uniform(27, 34), draw.uniform(13, 17)
    caption = draw.caption("hide", colour, side=side.name)
    ball = rolling(colour, radius, side.x(draw.uniform(6, 9)), side.sign * draw.extent(2.7, 3.4))
    centre = side.x(centre)
    screen = Screen(centre - width / 2, centre + width / 2, draw.uniform(30, 36))
    return Scene("hide", caption, (ball,), (), screen)


SCENARIOS: dict[str, Callable[[Draw], Scene]] = {
    scenario.__name__: scenario
    for scenario in (fall, drop, throw, roll, slide, ramp, collide, chain, stack, catch, hide)
}


def draw_scene(
    seed: int, index: int, scenario: str | None = None, split: Split = "within"
) -> Scene:
    """Draw a scene of a seed's endless series. The same arguments give the same scene.

    Args:
        index: Number of the scene in the series.
        scenario: A key of SCENARIOS. By default one is drawn, all equally likely.
    """
    rng = np.random.default_rng([seed, index])
    drawn = list(SCENARIOS)[rng.integers(len(SCENARIOS))]
    scene = SCENARIOS[scenario or drawn](Draw(rng, split))
    look = Look(seed=int(rng.integers(2**32)), clutter=int(rng.integers(3)))
    return replace(scene, look=look)


HELD_OUT_SEED = 1_000_003
"""No model is trained on clips of this seed. The law checks are calibrated on them."""
