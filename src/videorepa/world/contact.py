"""Clips that end before the red object touches the yellow one, or does not.

They pose Physion's task, object contact prediction (arXiv 2106.08261), in the lab's world. A scene
is specified by its middle frame. Motions through that frame are drawn until one ends in contact and
one does not, and the clip shows either. So the middle frame has the same distribution for both
answers and carries no information. The first and last frames carry little: before contact, objects
come from farther away and end nearer. The motion carries the answer. Objects move to the right,
towards the yellow one, since a linear probe cannot tell whether two objects approach each other if
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

LAST_SHOWN = FRAMES - 1
"""Number of the last frame that is shown."""

MIDDLE = 8
"""Number of the frame whose positions a setting fixes. With 8, the first and the last frame carry
the same amount of information."""

RIGHT = Side(1)

RED, YELLOW = 0, 1
"""Their indices among a scene's bodies."""

TRIES = 60
"""Number of motions to try for a setting before another is drawn."""


@dataclass(frozen=True)
class Setting:
    """The positions in the middle frame.

    Attributes:
        draw_motion: Draws a motion through that frame, as the initial states of the red object, the
            yellow one, and others.
    """

    draw_motion: Callable[[], tuple[Body, ...]]
    planks: tuple[Plank, ...] = ()
    screen: Screen | None = None


def contact_clip(seed: int, index: int) -> tuple[Clip, bool]:
    """Draw a clip of a seed's series, and its answer.

    Returns:
        The clip, and whether the red object touches the yellow one in the HORIZON frames after its
        end. It does for every even index and for no odd one.
    """
    # Seeded differently from `unlabelled_clip`, so that no teacher has seen these clips.
    rng = np.random.default_rng([seed, index, 1])
    for scenes in _scene_pairs(rng):
        scene = scenes[index % 2]
        trajectory = simulate(scene)
        return Clip(render(scene, trajectory), scene, trajectory), index % 2 == 0
    raise AssertionError("unreachable: there is always another setting")


def unlabelled_clip(seed: int, index: int, frames: int = FRAMES) -> np.ndarray:
    """Draw a clip for training teachers, without caption or label: (frames, SIZE, SIZE, 3) uint8.

    Two thirds are excerpts of contact scenes and one third are captioned scenarios. All have
    clutter and a shaking camera.
    """
    rng = np.random.default_rng([seed, index])
    look = _draw_look(rng)
    if rng.random() < 1 / 3:
        scene = replace(draw_scene(int(rng.integers(2**32)), index), look=look)
        return render(scene, simulate(scene, frames))
    draw = Draw(rng)
    setting, scene = _draw_setting(draw, Side.drawn(draw))
    scene = replace(scene, bodies=setting.draw_motion() + scene.bodies, look=look)
    first = int(rng.integers(HORIZON + 1))
    whole = simulate(scene, first + frames)
    excerpt = (array[first:] for array in (whole.positions, whole.angles, whole.touched))
    return render(scene, Trajectory(*excerpt))


def _scene_pairs(rng: np.random.Generator) -> Iterator[tuple[Scene, Scene]]:
    """Pairs of scenes with the same setting: one that ends in contact, and one that does not."""
    while True:
        draw = Draw(rng)
        setting, scene = _draw_setting(draw, RIGHT)
        scene = replace(scene, look=_draw_look(rng))
        by_answer: dict[bool, Scene] = {}
        for _ in range(TRIES):
            tried = replace(scene, bodies=setting.draw_motion() + scene.bodies)
            answer = _answer(tried)
            if answer is not None:
                by_answer[answer] = tried
            if len(by_answer) == 2:
                yield by_answer[True], by_answer[False]
                break


def _answer(scene: Scene) -> bool | None:
    """Whether red and yellow touch within the horizon.

    Returns None for a scene that cannot be used, because bodies already touch in the clip, or red
    or yellow is out of view in some frame from the sixth on.
    """
    trajectory = simulate(scene, FRAMES + HORIZON)
    at = trajectory.positions[5:FRAMES, :2]
    if trajectory.touched[LAST_SHOWN].any() or at.min() < 0 or at.max() > SIZE:
        return None
    return bool(trajectory.touched[-1, RED, YELLOW])


def _draw_setting(draw: Draw, side: Side) -> tuple[Setting, Scene]:
    """A setting, and a scene with its planks and screen, and with bodies that play no part."""
    name = tuple(KINDS)[int(draw.rng.integers(len(KINDS)))]
    others = [colour for colour in draw.colours(6) if colour not in ("red", "yellow")]
    setting = KINDS[name](draw, side, others[0])
    planks, bodies = setting.planks, []
    if draw.chance(0.4):
        x, y, radius = draw.uniform(8, 56), draw.uniform(10, 20), draw.uniform(3.5, 5)
        shelf = Plank((x - radius - 2, y), (x + radius + 2, y))
        planks += (shelf,)
        position = (x, y - shelf.radius - radius)
        bodies.append(Ball(colour=others[1], radius=radius, position=position))
    screen = setting.screen
    if screen is None and draw.chance(0.25):
        x, width = draw.uniform(6, 58), draw.uniform(6, 11)
        screen = Screen(x - width / 2, x + width / 2, draw.uniform(30, 42))
    return setting, Scene(name, "", tuple(bodies), planks, screen)


def _draw_look(rng: np.random.Generator) -> Look:
    shake = float(rng.uniform(0, 1.5))
    return Look(seed=int(rng.integers(2**32)), clutter=int(rng.integers(2, 7)), shake=shake)


def _meet(draw: Draw, side: Side, other: str) -> Setting:
    """Both objects are on the floor, rolling or still."""
    red_radius, yellow_radius = draw.uniform(4, 6), draw.uniform(4, 6)
    red = draw.uniform(18, 34)
    yellow = red + red_radius + yellow_radius + draw.uniform(8, 22)

    def motion() -> tuple[Body, ...]:
        ahead = draw.uniform(0.2, 1.8)
        away = draw.uniform(-1.0, 1.0) if draw.chance(0.6) else 0.0
        return (
            _rolling_at("red", red_radius, side, red, ahead),
            _rolling_at("yellow", yellow_radius, side, yellow, away),
        )

    return Setting(motion)


def _push(draw: Draw, side: Side, other: str) -> Setting:
    """A third ball rolls towards the red one from behind and pushes it."""
    radii = draw.uniform(4, 5.5), draw.uniform(4, 5.5), draw.uniform(4, 6)
    third = draw.uniform(8, 16)
    red = third + radii[2] + radii[0] + draw.uniform(6, 14)
    yellow = red + radii[0] + radii[1] + draw.uniform(2, 12)

    def motion() -> tuple[Body, ...]:
        return (
            _rolling_at("red", radii[0], side, red, 0.0),
            _rolling_at("yellow", radii[1], side, yellow, 0.0),
            _rolling_at(other, radii[2], side, third, draw.uniform(0.3, 1.8)),
        )

    return Setting(motion)


def _brake(draw: Draw, side: Side, other: str) -> Setting:
    """The red box slides, and friction slows it down."""
    height, radius = draw.uniform(6, 8), draw.uniform(4, 6)
    width = height * draw.uniform(1.3, 1.8)
    red = draw.uniform(16, 30)
    yellow = red + width / 2 + radius + draw.uniform(6, 16)

    def motion() -> tuple[Body, ...]:
        brake, speed = draw.uniform(0.02, 0.10), draw.uniform(0.3, 2.0)
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
        return box, _rolling_at("yellow", radius, side, yellow, 0.0)

    return Setting(motion)


def _land(draw: Draw, side: Side, other: str) -> Setting:
    """The red ball is in the air, and the yellow one is on the floor, perhaps in an open box."""
    red_radius, yellow_radius = draw.uniform(3.5, 5), draw.uniform(4, 5.5)
    x, y = draw.uniform(12, 36), draw.uniform(8, 20)
    yellow = x + draw.uniform(-4, 26)
    boxed = draw.chance(0.3)
    inside = yellow_radius + draw.uniform(3, 6)
    planks = cup(side.x(yellow) - inside, side.x(yellow) + inside, FLOOR - draw.uniform(6, 12))

    def motion() -> tuple[Body, ...]:
        ahead, down = draw.uniform(-0.4, 2.2), draw.uniform(-1.2, 0.6)
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
        away = 0.0 if boxed else draw.uniform(-1.0, 1.0)
        return red, _rolling_at("yellow", yellow_radius, side, yellow, away)

    return Setting(motion, planks if boxed else ())


def _descend(draw: Draw, side: Side, other: str) -> Setting:
    """The red ball is on a ramp, and the yellow one is on the floor in front of it."""
    red_radius, yellow_radius = draw.uniform(4, 5.5), draw.uniform(4, 5.5)
    foot, slope = draw.uniform(28, 40), np.radians(draw.uniform(12, 24))
    above = draw.uniform(8, 18)
    # A rolling disc accelerates two thirds as much as one that slides without friction.
    gain = 2 / 3 * GRAVITY * float(np.sin(slope))
    yellow = foot + red_radius + yellow_radius + draw.uniform(0, 12)
    plank = side.plank(-16, FLOOR - (foot + 16) * np.tan(slope), foot, FLOOR)

    def motion() -> tuple[Body, ...]:
        start = draw.uniform(-0.2, 1.4)
        back = MIDDLE * start + MIDDLE**2 / 2 * gain
        return (
            on_ramp("red", red_radius, side, foot, slope, above + back, start),
            _rolling_at("yellow", yellow_radius, side, yellow, draw.uniform(-0.3, 1.2)),
        )

    return Setting(motion, (plank,))


def _rolling_at(colour: str, radius: float, side: Side, x: float, speed: float) -> Ball:
    """A rolling ball that is at x in the middle frame."""
    return rolling(colour, radius, side.x(x - MIDDLE * speed), side.sign * speed)


KINDS = {"meet": _meet, "push": _push, "brake": _brake, "land": _land, "descend": _descend}
