"""Clips that end before the red object touches the yellow one, or does not.

They pose Physion's task, object contact prediction (arXiv 2106.08261), in the lab's world. A scene
is drawn by its middle frame. Motions through that frame are drawn until one ends in contact and one
does not, and the clip shows either. So the middle frame has the same distribution for both answers
and carries no information. The first and last frames carry little: before contact, objects come
from farther away and end nearer. The motion carries the answer. Objects move to the right, where
the yellow one is, since a linear probe cannot tell whether two objects approach each other if
either may be on either side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from videorepa.world.render import Clip, render
from videorepa.world.scenarios import Draw, Side, cup, draw_scene, on_ramp, rolling
from videorepa.world.simulator import (
    FLOOR,
    FRAMES,
    GRAVITY,
    SIZE,
    Ball,
    Body,
    Box,
    Look,
    Plank,
    Scene,
    Screen,
    Trajectory,
    simulate,
)

HORIZON = 16
"""Frames after the clip in which contact counts: two seconds."""

SHOWN = FRAMES - 1
"""Number of the last frame that is shown."""

MIDDLE = 8
"""Number of the frame whose positions a setting fixes. At 8, the first and the last frame carry
equally much information."""

RIGHT = Side(1)

RED, YELLOW = 0, 1
"""Their indices among a scene's bodies."""

TRIES = 60
"""Motions to try for a setting before another is drawn."""


@dataclass(frozen=True)
class Setting:
    """What the middle frame shows.

    Attributes:
        move: Draws a motion through that frame, as the initial states of the red object, the
            yellow one, and others.
    """

    move: Callable[[], tuple[Body, ...]]
    planks: tuple[Plank, ...] = ()
    screen: Screen | None = None


def contact_clip(seed: int, index: int) -> tuple[Clip, bool]:
    """A clip of the series of a seed, and its answer.

    Returns:
        The clip, and whether the red object touches the yellow one in the HORIZON frames after its
        end. It does for every even index and for no odd one.
    """
    # Seeded apart from `unlabelled_clip`, so that no teacher has seen these clips.
    rng = np.random.default_rng([seed, index, 1])
    for scenes in _pairs(rng):
        scene = scenes[index % 2]
        trajectory = simulate(scene)
        return Clip(render(scene, trajectory), scene, trajectory), index % 2 == 0
    raise AssertionError("settings do not end")


def unlabelled_clip(seed: int, index: int, frames: int = FRAMES) -> np.ndarray:
    """A clip for training teachers, without caption or label: (frames, SIZE, SIZE, 3) uint8.

    Two thirds are excerpts of contact scenes and one third are captioned scenarios. All have
    clutter and a shaking camera.
    """
    rng = np.random.default_rng([seed, index])
    look = _look(rng)
    if rng.random() < 1 / 3:
        scene = replace(draw_scene(int(rng.integers(2**32)), index), look=look)
        return render(scene, simulate(scene, frames))
    draw = Draw(rng)
    setting, scene = _drawn(draw, Side.drawn(draw))
    scene = replace(scene, bodies=setting.move() + scene.bodies, look=look)
    first = int(rng.integers(HORIZON + 1))
    whole = simulate(scene, first + frames)
    part = (array[first:] for array in (whole.positions, whole.angles, whole.touched))
    return render(scene, Trajectory(*part))


def _pairs(rng: np.random.Generator) -> Iterator[tuple[Scene, Scene]]:
    """Pairs of scenes with the same setting: one that ends in contact, and one that does not."""
    while True:
        draw = Draw(rng)
        setting, scene = _drawn(draw, RIGHT)
        scene = replace(scene, look=_look(rng))
        by_answer: dict[bool, Scene] = {}
        for _ in range(TRIES):
            tried = replace(scene, bodies=setting.move() + scene.bodies)
            answer = _answer(tried)
            if answer is not None:
                by_answer[answer] = tried
            if len(by_answer) == 2:
                yield by_answer[True], by_answer[False]
                break


def _answer(scene: Scene) -> bool | None:
    """Whether red and yellow touch within the horizon.

    Gives None for a scene that cannot be used: bodies already touch in the clip, or red or yellow
    is out of view in any frame from the sixth on.
    """
    trajectory = simulate(scene, FRAMES + HORIZON)
    at = trajectory.positions[5:FRAMES, :2]
    if trajectory.touched[SHOWN].any() or at.min() < 0 or at.max() > SIZE:
        return None
    return bool(trajectory.touched[-1, RED, YELLOW])


def _drawn(draw: Draw, side: Side) -> tuple[Setting, Scene]:
    """A setting, and a scene around it: planks, a screen, and bodies that play no part."""
    name = tuple(KINDS)[int(draw.rng.integers(len(KINDS)))]
    others = [colour for colour in draw.colours(6) if colour not in ("red", "yellow")]
    setting = KINDS[name](draw, side, others[0])
    planks, bodies = setting.planks, []
    if draw.chance(0.4):
        x, y, radius = draw.place(8, 56), draw.place(10, 20), draw.place(3.5, 5)
        shelf = Plank((x - radius - 2, y), (x + radius + 2, y))
        planks += (shelf,)
        still = Ball(colour=others[1], radius=radius, position=(x, y - shelf.radius - radius))
        bodies.append(replace(still, velocity=(0.0, 0.0)))
    screen = setting.screen
    if screen is None and draw.chance(0.25):
        x, width = draw.place(6, 58), draw.place(6, 11)
        screen = Screen(x - width / 2, x + width / 2, draw.place(30, 42))
    return setting, Scene(name, "", tuple(bodies), planks, screen)


def _look(rng: np.random.Generator) -> Look:
    shake = float(rng.uniform(0, 1.5))
    return Look(seed=int(rng.integers(2**32)), clutter=int(rng.integers(2, 7)), shake=shake)


def _meet(draw: Draw, side: Side, other: str) -> Setting:
    """Both objects are on the floor, rolling or still."""
    red_radius, yellow_radius = draw.place(4, 6), draw.place(4, 6)
    red = draw.place(18, 34)
    yellow = red + red_radius + yellow_radius + draw.place(8, 22)

    def move() -> tuple[Body, ...]:
        ahead = draw.place(0.2, 1.8)
        away = draw.place(-1.0, 1.0) if draw.chance(0.6) else 0.0
        return (
            _rolled("red", red_radius, side, red, ahead),
            _rolled("yellow", yellow_radius, side, yellow, away),
        )

    return Setting(move)


def _push(draw: Draw, side: Side, other: str) -> Setting:
    """A third ball rolls towards the red one from behind and sets it in motion."""
    radii = draw.place(4, 5.5), draw.place(4, 5.5), draw.place(4, 6)
    third = draw.place(8, 16)
    red = third + radii[2] + radii[0] + draw.place(6, 14)
    yellow = red + radii[0] + radii[1] + draw.place(2, 12)

    def move() -> tuple[Body, ...]:
        return (
            _rolled("red", radii[0], side, red, 0.0),
            _rolled("yellow", radii[1], side, yellow, 0.0),
            _rolled(other, radii[2], side, third, draw.place(0.3, 1.8)),
        )

    return Setting(move)


def _brake(draw: Draw, side: Side, other: str) -> Setting:
    """The red box slides, and friction slows it down."""
    height, radius = draw.place(6, 8), draw.place(4, 6)
    width = height * draw.place(1.3, 1.8)
    red = draw.place(16, 30)
    yellow = red + width / 2 + radius + draw.place(6, 16)

    def move() -> tuple[Body, ...]:
        brake, speed = draw.place(0.02, 0.10), draw.place(0.3, 2.0)
        start = red - MIDDLE * speed - MIDDLE**2 / 2 * brake
        box = Box(
            colour="red",
            width=width,
            height=height,
            position=(side.x(start), FLOOR - height / 2),
            velocity=(side.sign * (speed + MIDDLE * brake), 0.0),
            elasticity=0.3,
            friction=brake / GRAVITY,
        )
        return box, _rolled("yellow", radius, side, yellow, 0.0)

    return Setting(move)


def _land(draw: Draw, side: Side, other: str) -> Setting:
    """The red ball is in the air, and the yellow one is on the floor, perhaps in an open box."""
    red_radius, yellow_radius = draw.place(3.5, 5), draw.place(4, 5.5)
    x, y = draw.place(12, 36), draw.place(8, 20)
    yellow = x + draw.place(-4, 26)
    boxed = draw.chance(0.3)
    inside = yellow_radius + draw.place(3, 6)
    planks = cup(side.x(yellow) - inside, side.x(yellow) + inside, FLOOR - draw.place(6, 12))

    def move() -> tuple[Body, ...]:
        ahead, down = draw.place(-0.4, 2.2), draw.place(-1.2, 0.6)
        red = Ball(
            colour="red",
            radius=red_radius,
            position=(
                side.x(x - MIDDLE * ahead),
                y - MIDDLE * down + MIDDLE**2 / 2 * GRAVITY,
            ),
            velocity=(side.sign * ahead, down - MIDDLE * GRAVITY),
            elasticity=0.6,
        )
        away = 0.0 if boxed else draw.place(-1.0, 1.0)
        return red, _rolled("yellow", yellow_radius, side, yellow, away)

    return Setting(move, planks if boxed else ())


def _descend(draw: Draw, side: Side, other: str) -> Setting:
    """The red ball is on a ramp, and the yellow one is on the floor in front of it."""
    red_radius, yellow_radius = draw.place(4, 5.5), draw.place(4, 5.5)
    foot, slope = draw.place(28, 40), np.radians(draw.place(12, 24))
    above = draw.place(8, 18)
    # A rolling disc accelerates two thirds as much as one that slides without friction.
    gain = 2 / 3 * GRAVITY * float(np.sin(slope))
    yellow = foot + red_radius + yellow_radius + draw.place(0, 12)
    plank = side.plank(-16, FLOOR - (foot + 16) * np.tan(slope), foot, FLOOR)

    def move() -> tuple[Body, ...]:
        start = draw.place(-0.2, 1.4)
        back = MIDDLE * start + MIDDLE**2 / 2 * gain
        return (
            on_ramp("red", red_radius, side, foot, slope, above + back, start),
            _rolled("yellow", yellow_radius, side, yellow, draw.place(-0.3, 1.2)),
        )

    return Setting(move, (plank,))


def _rolled(colour: str, radius: float, side: Side, x: float, speed: float) -> Ball:
    """A ball that is at x in the middle frame."""
    return rolling(colour, radius, side.x(x - MIDDLE * speed), side.sign * speed)


KINDS = {"meet": _meet, "push": _push, "brake": _brake, "land": _land, "descend": _descend}
