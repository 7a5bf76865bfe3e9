"""The simulator: balls and boxes on a floor with planks, moved by a 2-D physics engine.

Lengths are in pixels of a 64 x 64 frame, with y pointing down. Times are in frames, 8 per second.
So velocities are in pixels per frame, and gravity is in pixels per frame squared.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field

import numpy as np
import pymunk

from videorepa.system.stopping import postponed

VERSION = 2
"""Increased whenever a change gives the same seed other clips."""

SIZE = 64
"""Width and height of a frame, in pixels."""

FRAMES = 17
"""Frames in a clip: one for the first latent frame, and four for each further one."""

FPS = 8

FLOOR = 54.0
"""Height of the floor's surface, in pixels from the top."""

GRAVITY = 0.45
"""Pixels per frame squared, the same in every clip. Falling half the height takes 12 frames."""

SUBSTEPS = 8
"""Engine steps per frame. A body that falls from the top moves 0.8 pixels in its last step."""

TOUCHED = ("floor", "plank", "body")
"""What a body can touch."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "yellow": (0.93, 0.85, 0.12),
    "green": (0.14, 0.62, 0.25),
    "cyan": (0.10, 0.74, 0.80),
    "blue": (0.16, 0.33, 0.86),
    "purple": (0.58, 0.20, 0.72),
}


@dataclass(frozen=True, kw_only=True)
class Body(ABC):
    """Something that moves, in its initial state.

    Attributes:
        colour: A key of COLOURS.
        position: Its centre, x and y.
        velocity: In pixels per frame.
        spin: In radians per frame, clockwise on the screen.
        elasticity: Share of its speed that it keeps when it bounces on the floor. Between two
            bodies the product of both applies.
        friction: Coefficient of friction on the floor. Between two bodies the product of both
            applies.
    """

    colour: str
    position: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    spin: float = 0.0
    elasticity: float = 0.6
    friction: float = 0.3

    @property
    @abstractmethod
    def area(self) -> float:
        """Area in square pixels, which is also its mass."""


@dataclass(frozen=True, kw_only=True)
class Ball(Body):
    """A disc. It rolls without losing speed."""

    radius: float

    @property
    def area(self) -> float:
        return float(np.pi * self.radius**2)


@dataclass(frozen=True, kw_only=True)
class Box(Body):
    """A rectangle that starts upright. It slides, and friction stops it."""

    width: float
    height: float

    @property
    def area(self) -> float:
        return self.width * self.height


@dataclass(frozen=True)
class Plank:
    """A dark rail with round ends that never moves. Ramps, shelves and the sides of an open box are
    planks."""

    start: tuple[float, float]
    end: tuple[float, float]
    radius: float = 2.0


@dataclass(frozen=True)
class Screen:
    """An upright opaque board standing on the floor, in front of the bodies."""

    left: float
    right: float
    top: float


@dataclass(frozen=True)
class Look:
    """The appearance of a clip apart from its bodies. Physics does not depend on it.

    Attributes:
        seed: Seed of the texture and light of wall and floor.
        clutter: Number of gray patches on the wall.
        shake: Root mean square of the camera's offset over a clip, in pixels.
    """

    seed: int = 0
    clutter: int = 0
    shake: float = 0.0


@dataclass(frozen=True)
class Scene:
    """Everything that determines a clip, and the caption that describes it.

    Attributes:
        event: The scenario's name.
        bodies: First those that the caption mentions, in its order.
    """

    event: str
    caption: str
    bodies: tuple[Body, ...]
    planks: tuple[Plank, ...] = ()
    screen: Screen | None = None
    look: Look = Look()


@dataclass(frozen=True)
class Trajectory:
    """The motion of a scene's bodies.

    Attributes:
        positions: (F, bodies, 2), centres in pixels, x to the right and y down.
        angles: (F, bodies), in radians, clockwise on the screen.
        touched: (F, bodies, bodies) bool, whether two bodies have touched by that frame.
    """

    positions: np.ndarray
    angles: np.ndarray = field(repr=False)
    touched: np.ndarray = field(repr=False)


def simulate(scene: Scene, frames: int = FRAMES, gravity: float = GRAVITY) -> Trajectory:
    """Simulate a scene.

    Args:
        frames: Number of frames. The first is the initial state.
        gravity: In pixels per frame squared. Only clips that are broken on purpose change it.
    """
    # The engine drops what signals raise in what it calls: in `touch`, and a touch with it, and
    # where it is freed.
    with postponed(shown=False):
        return _simulate(scene, frames, gravity)


def until_contact(scene: Scene, frames: int = FRAMES, horizon: int = FRAMES) -> np.ndarray:
    """Compute, for each frame, when each body will touch something.

    Args:
        frames: Number of frames.
        horizon: How many frames ahead contact counts, the last frames' beyond the clip's end.

    Returns:
        (frames, bodies, len(TOUCHED)): the time in frames until a body touches the floor, a plank
        and another body, exact to an engine step; 0 while it does, infinite if it does not.
    """
    with postponed(shown=False):
        touching = _touching(scene, (frames - 1 + horizon) * SUBSTEPS)
    waits = np.full(touching.shape, np.inf)
    wait = waits[-1]
    for step in reversed(range(len(touching))):
        wait = waits[step] = np.where(touching[step], 0.0, wait + 1 / SUBSTEPS)
    waits = waits[::SUBSTEPS][:frames]
    return np.where(waits <= horizon, waits, np.inf)


def _touching(scene: Scene, steps: int) -> np.ndarray:
    """(steps + 1, bodies, len(TOUCHED)) bool, what each body touches after each engine step."""
    space, bodies, floor = _space(scene, GRAVITY)
    index_of = {shape: index for index, body in enumerate(bodies) for shape in body.shapes}
    touching = np.zeros((steps + 1, len(bodies), len(TOUCHED)), bool)
    now = np.zeros_like(touching[0])

    def touch(arbiter: pymunk.Arbiter, _space: pymunk.Space, _data: object) -> None:
        one, other = arbiter.shapes
        for shape, touched in ((one, other), (other, one)):
            if (body := index_of.get(shape)) is not None:
                kind = "body" if touched in index_of else "floor" if touched is floor else "plank"
                now[body, TOUCHED.index(kind)] = True

    space.on_collision(pre_solve=touch)
    for after in touching[1:]:
        now[:] = False
        space.step(1.0 / SUBSTEPS)
        after[:] = now
    # The engine finds contacts when it steps: those of the initial state in the first step.
    touching[0] = touching[1]
    return touching


def _simulate(scene: Scene, frames: int, gravity: float) -> Trajectory:
    space, engine_bodies, _ = _space(scene, gravity)
    count = len(engine_bodies)
    touching = np.zeros((count, count), bool)
    index_of = {shape: index for index, body in enumerate(engine_bodies) for shape in body.shapes}

    def touch(arbiter: pymunk.Arbiter, _space: pymunk.Space, _data: object) -> None:
        first, second = (index_of.get(shape) for shape in arbiter.shapes)
        if first is not None and second is not None:
            touching[first, second] = touching[second, first] = True

    space.on_collision(begin=touch)
    positions = np.empty((frames, count, 2), np.float32)
    angles = np.empty((frames, count), np.float32)
    touched = np.empty((frames, count, count), bool)
    for frame in range(frames):
        for _ in range(SUBSTEPS if frame else 0):
            space.step(1.0 / SUBSTEPS)
        positions[frame] = [body.position for body in engine_bodies]
        angles[frame] = [body.angle for body in engine_bodies]
        touched[frame] = touching
    return Trajectory(positions, angles, touched)


def _space(scene: Scene, gravity: float) -> tuple[pymunk.Space, list[pymunk.Body], pymunk.Segment]:
    """The engine's space in its initial state, its bodies in the scene's order, and the floor."""
    space = pymunk.Space()
    space.gravity = (0.0, gravity)
    space.collision_slop = 0.02
    floor = pymunk.Segment(space.static_body, (-1000, FLOOR + 10), (1000, FLOOR + 10), 10)
    floor.elasticity, floor.friction = 1.0, 1.0
    space.add(floor)
    for plank in scene.planks:
        rail = pymunk.Segment(space.static_body, plank.start, plank.end, plank.radius)
        rail.elasticity, rail.friction = 0.6, 1.0
        space.add(rail)
    bodies = [_engine_body(body) for body in scene.bodies]
    for body, shape in bodies:
        space.add(body, shape)
    return space, [body for body, _ in bodies], floor


def _engine_body(body: Body) -> tuple[pymunk.Body, pymunk.Shape]:
    """The engine's body and shape, with unit density, so that the mass is the visible area."""
    if isinstance(body, Ball):
        moment = pymunk.moment_for_circle(body.area, 0, body.radius)
        engine_body = pymunk.Body(body.area, moment)
        shape: pymunk.Shape = pymunk.Circle(engine_body, body.radius)
    else:
        assert isinstance(body, Box)
        sides = (body.width, body.height)
        engine_body = pymunk.Body(body.area, pymunk.moment_for_box(body.area, sides))
        shape = pymunk.Poly.create_box(engine_body, sides)
    engine_body.position, engine_body.velocity = body.position, body.velocity
    engine_body.angular_velocity = body.spin
    shape.elasticity, shape.friction = body.elasticity, body.friction
    return engine_body, shape
