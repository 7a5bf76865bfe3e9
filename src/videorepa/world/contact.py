"""Clips that end before the red object touches the yellow one, and whether it is about to.

They ask Physion's question (object contact prediction, arXiv 2106.08261) of the lab's world. A
scene is drawn by where things are in a middle frame; then motions through it are drawn, until one
ends in contact and one does not, and one of the two is taken. So that frame is drawn alike for both
answers and tells nothing; the first and the last tell little, since what will touch comes from
farther away and is nearer at the end. The motion tells. Things go to the right, where the yellow
object is: a linear probe cannot ask whether two things approach each other when either may be on
either side.
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
"""Number of the frame whose positions a setting says. At 8, the first and the last frame tell
equally much."""

RIGHT = Side(1)

RED, YELLOW = 0, 1
"""Their numbers among a scene's bodies."""

TRIES = 60
"""Motions that are tried for one setting, before another is drawn."""


@dataclass(frozen=True)
class Setting:
    """What the middle frame shows.

    move: draws a motion through it: the red and the yellow object, and others, as they start.
    """

    move: Callable[[], tuple[Body, ...]]
    planks: tuple[Plank, ...] = ()
    screen: Screen | None = None


def contact_clip(seed: int, index: int) -> tuple[Clip, bool]:
    """Clip number `index` of the series that `seed` names, and whether the red object touches the
    yellow one in the HORIZON frames after its end: for even numbers it does, for odd ones not."""
    # A series of its own: no teacher has seen these clips, whatever its seed.
    rng = np.random.default_rng([seed, index, 1])
    for scenes in _pairs(rng):
        scene = scenes[index % 2]
        trajectory = simulate(scene)
        return Clip(render(scene, trajectory), scene, trajectory), index % 2 == 0
    raise AssertionError("settings do not end")


def unlabelled_clip(seed: int, index: int, frames: int = FRAMES) -> np.ndarray:
    """Frames (frames, SIZE, SIZE, 3) uint8 without caption or label, for teachers: of every three,
    two are a stretch of what contact is asked about, and one is of the captioned scenarios; all
    with clutter and a camera that shakes."""
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
    """Scenes of one setting, one that ends in contact and one that does not."""
    while True:
        draw = Draw(rng)
        setting, scene = _drawn(draw, RIGHT)
        scene = replace(scene, look=_look(rng))
        found: dict[bool, Scene] = {}
        for _ in range(TRIES):
            tried = replace(scene, bodies=setting.move() + scene.bodies)
            answer = _answer(tried)
            if answer is not None:
                found[answer] = tried
            if len(found) == 2:
                yield found[True], found[False]
                break


def _answer(scene: Scene) -> bool | None:
    """Whether red and yellow touch within the horizon; None if they or others already do in what
    is shown, or if they are not in the frame from the sixth frame on."""
    trajectory = simulate(scene, FRAMES + HORIZON)
    at = trajectory.positions[5:FRAMES, :2]
    if trajectory.touched[SHOWN].any() or at.min() < 0 or at.max() > SIZE:
        return None
    return bool(trajectory.touched[-1, RED, YELLOW])


def _drawn(draw: Draw, side: Side) -> tuple[Setting, Scene]:
    """A setting, and what it stands in: planks, screen, and bodies that have no part in it."""
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
    """Both on the floor, each rolling or still."""
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
    """A third ball rolls towards the red one from behind, and will set it in motion."""
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
    """The red ball is in the air; the yellow one on the floor, perhaps in an open box."""
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
    """The red ball is on a ramp; the yellow one on the floor before it."""
    red_radius, yellow_radius = draw.place(4, 5.5), draw.place(4, 5.5)
    foot, slope = draw.place(28, 40), np.radians(draw.place(12, 24))
    above = draw.place(8, 18)
    # A disc that rolls down gains two thirds of what one that slides without friction gains.
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
    """A ball that rolls past x in the middle frame."""
    return rolling(colour, radius, side.x(x - MIDDLE * speed), side.sign * speed)


KINDS = {"meet": _meet, "push": _push, "brake": _brake, "land": _land, "descend": _descend}
