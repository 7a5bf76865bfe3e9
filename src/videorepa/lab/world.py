"""The simulator: a few balls, a floor and perhaps a screen, moved by a 2-D physics engine.

Lengths are in pixels of a 64 x 64 frame, y points down, times are in frames (8 frames make a
second), so a velocity is in pixels per frame and gravity in pixels per frame squared.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pymunk

VERSION = 1
"""Raised whenever the same seed gives other clips than before."""
SIZE = 64
"""Width and height of a frame, in pixels."""
FRAMES = 17
"""Frames in a clip: one, then four for every further latent frame."""
FPS = 8
FLOOR = 54.0
"""Height of the floor's surface, in pixels from the top."""
GRAVITY = 1.2
"""Pixels per frame squared, the same in every clip."""
SUBSTEPS = 10
"""Engine steps per frame: a ball at terminal speed moves under 1.5 pixels in one."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.16, 0.16),
    "yellow": (0.93, 0.85, 0.12),
    "green": (0.14, 0.62, 0.25),
    "cyan": (0.10, 0.74, 0.80),
    "blue": (0.16, 0.33, 0.86),
    "purple": (0.58, 0.20, 0.72),
}


@dataclass(frozen=True)
class Ball:
    """A ball: its colour's name, radius, and where and how it starts."""

    colour: str
    radius: float
    position: tuple[float, float]
    velocity: tuple[float, float] = (0.0, 0.0)
    elasticity: float = 0.6


@dataclass(frozen=True)
class Screen:
    """An upright opaque board standing on the floor, in front of the balls."""

    left: float
    right: float
    top: float


@dataclass(frozen=True)
class Scene:
    """All that decides a clip, with the caption that describes it."""

    event: str
    caption: str
    balls: tuple[Ball, ...]
    screen: Screen | None = None


@dataclass(frozen=True)
class Trajectory:
    """What happened in a scene.

    positions: (FRAMES, balls, 2), centres in pixels, x to the right and y down.
    contact: (FRAMES,), whether two balls have touched by then.
    """

    positions: np.ndarray
    contact: np.ndarray = field(repr=False)


def simulate(scene: Scene, frames: int = FRAMES) -> Trajectory:
    """Move the scene for `frames` frames; the first is the starting state."""
    space = pymunk.Space()
    space.gravity = (0.0, GRAVITY)
    floor = pymunk.Segment(space.static_body, (-1000, FLOOR + 10), (1000, FLOOR + 10), 10)
    floor.elasticity, floor.friction = 1.0, 1.0
    space.add(floor)
    bodies = []
    for ball in scene.balls:
        mass = ball.radius**2
        body = pymunk.Body(mass, pymunk.moment_for_circle(mass, 0, ball.radius))
        body.position = ball.position
        body.velocity = ball.velocity
        on_floor = ball.position[1] + ball.radius > FLOOR - 0.5
        # A ball that starts on the floor starts rolling, not sliding.
        body.angular_velocity = ball.velocity[0] / ball.radius if on_floor else 0.0
        shape = pymunk.Circle(body, ball.radius)
        shape.elasticity, shape.friction = ball.elasticity, 0.3
        space.add(body, shape)
        bodies.append(body)

    reach = sum(ball.radius for ball in scene.balls) if len(bodies) == 2 else -1.0
    positions = np.empty((frames, len(bodies), 2), np.float32)
    contact = np.zeros(frames, bool)
    touched = False
    for frame in range(frames):
        if frame:
            for _ in range(SUBSTEPS):
                space.step(1.0 / SUBSTEPS)
                if reach > 0 and not touched:
                    touched = bodies[0].position.get_distance(bodies[1].position) < reach + 0.3
        positions[frame] = [body.position for body in bodies]
        contact[frame] = touched
    return Trajectory(positions, contact)
