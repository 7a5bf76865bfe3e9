"""The renderer: draws a scene's trajectory as anti-aliased RGB frames, a whole clip at once.

Wall and floor are nearly gray, with smooth textures and light. Only bodies have strong colours, so
hue distinguishes them from everything else. Brightness distinguishes the screen and the planks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from videorepa.world.scenarios import Split, draw_scene
from videorepa.world.simulator import (
    COLOURS,
    FLOOR,
    FRAMES,
    SIZE,
    Ball,
    Box,
    Look,
    Plank,
    Scene,
    Screen,
    Trajectory,
    simulate,
)

WALL = (0.74, 0.88)

GROUND = (0.40, 0.50)
"""Ranges of the mean brightness of the wall and of the floor, in [0, 1]."""

SCREEN, PLANK = 0.5, 0.22
"""Brightness of the screen and of planks, in [0, 1]."""

TINT = 0.04
"""Largest distance of the wall's and the floor's colour from gray. That of bodies is 0.35 to
0.65."""

TEXTURE, LIGHT, CLUTTER = 0.03, 0.04, 0.05
"""Largest changes of brightness due to texture, to light across a frame, and to clutter."""

SHADOW = 0.25
"""Share of the floor's light that a body directly above it takes away."""

_MARGIN = 8
"""Pixels of the room on each side of the frame, for a shaking camera."""


@dataclass(frozen=True)
class Clip:
    """A captioned clip with its ground truth.

    Attributes:
        frames: (FRAMES, SIZE, SIZE, 3) uint8 RGB.
    """

    frames: np.ndarray
    scene: Scene
    trajectory: Trajectory

    @property
    def caption(self) -> str:
        return self.scene.caption


def make_clip(
    seed: int,
    index: int,
    scenario: str | None = None,
    frames: int = FRAMES,
    split: Split = "within",
) -> Clip:
    """Simulate and render a scene. See `draw_scene` for the arguments."""
    scene = draw_scene(seed, index, scenario, split)
    trajectory = simulate(scene, frames)
    return Clip(render(scene, trajectory), scene, trajectory)


def render(scene: Scene, trajectory: Trajectory) -> np.ndarray:
    """Draw a scene: (frames, SIZE, SIZE, 3) uint8 RGB.

    A shape covers clip(0.5 - d, 0, 1) of a pixel whose centre has the signed distance d to the
    shape's edge. For these sizes that is accurate to a few percent.
    """
    camera = _camera(scene.look, len(trajectory.positions))
    rows, columns = _pixels(camera)
    frames = _room(scene.look, camera)
    _cast_shadows(frames, scene, trajectory, rows, columns)
    colours = [*(COLOURS[body.colour] for body in scene.bodies), (PLANK,) * 3, (SCREEN,) * 3]
    _paint_things(frames, scene, trajectory, rows, columns, np.array(colours, np.float32))
    return (np.clip(frames, 0, 1) * 255.0 + 0.5).astype(np.uint8)


def visible(scene: Scene, trajectory: Trajectory) -> np.ndarray:
    """What `render` shows in each pixel: (frames, SIZE, SIZE, bodies + 3) shares that add up to 1.

    They are those of each body, of planks, of the screen, and of the room behind all.
    """
    rows, columns = _pixels(_camera(scene.look, len(trajectory.positions)))
    count = len(scene.bodies) + 3
    shares = np.zeros((len(rows), SIZE, SIZE, count), np.float32)
    shares[..., -1] = 1
    # Each thing is painted over the others in a channel of its own.
    _paint_things(shares, scene, trajectory, rows, columns, np.eye(count, dtype=np.float32)[:-1])
    return shares


def _pixels(camera: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The places in the world of each frame's pixel centres: y by row and x by column."""
    axis = np.arange(SIZE, dtype=np.float32) + 0.5
    return axis + camera[:, 1, None], axis + camera[:, 0, None]


def _paint_things(
    frames: np.ndarray,
    scene: Scene,
    trajectory: Trajectory,
    rows: np.ndarray,
    columns: np.ndarray,
    colours: np.ndarray,
) -> None:
    """Paint planks, bodies and the screen over a clip.

    Args:
        colours: One of each body, of planks and of the screen, with as many channels as the clip.
    """
    *of_bodies, of_planks, of_screen = colours
    for plank in scene.planks:
        _paint(frames, _plank_distance(plank, rows, columns), of_planks)
    for index, body in enumerate(scene.bodies):
        x, y = trajectory.positions[:, index].T
        dx, dy = columns - x[:, None], rows - y[:, None]
        if isinstance(body, Ball):
            away = np.sqrt((dy**2)[:, :, None] + (dx**2)[:, None, :]) - body.radius
        else:
            assert isinstance(body, Box)
            away = _box_distance(body, trajectory.angles[:, index], dx, dy)
        _paint(frames, away, of_bodies[index])
    if scene.screen is not None:
        _paint(frames, _screen_distance(scene.screen, rows, columns), of_screen)


def _paint(frames: np.ndarray, distance: np.ndarray, colour: np.ndarray) -> None:
    """Paint a shape.

    Args:
        distance: (F, SIZE, SIZE), the signed distance of every pixel to the shape's edge.
    """
    # Paint only the pixels that the shape touches, which are a small part of the clip.
    hit = np.nonzero(distance < 0.5)
    cover = np.minimum(0.5 - distance[hit], 1.0)[:, None]
    frames[hit] += cover * (colour - frames[hit])


def _box_distance(box: Box, angle: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    cos, sin = np.cos(angle)[:, None], np.sin(angle)[:, None]
    along = np.abs((cos * dx)[:, None, :] + (sin * dy)[:, :, None]) - box.width / 2
    across = np.abs((cos * dy)[:, :, None] - (sin * dx)[:, None, :]) - box.height / 2
    return np.maximum(along, across)


def _plank_distance(plank: Plank, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    start, end = np.array(plank.start, np.float32), np.array(plank.end, np.float32)
    direction = (end - start) / ((end - start) ** 2).sum()
    dx, dy = (columns - start[0])[:, None, :], (rows - start[1])[:, :, None]
    along = np.clip(dx * direction[0] + dy * direction[1], 0.0, 1.0)
    x, y = dx - along * (end - start)[0], dy - along * (end - start)[1]
    away = np.sqrt(x**2 + y**2) - plank.radius
    # The part below the floor's surface is not visible.
    return np.maximum(away, (rows - FLOOR)[:, :, None])


def _screen_distance(screen: Screen, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
    across = np.maximum(screen.left - columns, columns - screen.right)
    down = np.maximum(screen.top - rows, rows - FLOOR)
    return np.maximum(across[:, None, :], down[:, :, None])


def _cast_shadows(
    frames: np.ndarray, scene: Scene, trajectory: Trajectory, rows: np.ndarray, columns: np.ndarray
) -> None:
    """Darken the floor below each body. The higher the body, the weaker its shadow."""
    depth = np.where(rows > FLOOR, np.exp(-(((rows - FLOOR) / 4) ** 2)), 0.0)
    for index, body in enumerate(scene.bodies):
        x, y = trajectory.positions[:, index].T
        half = np.sqrt(body.area / np.pi)
        height = np.maximum(FLOOR - y - half, 0.0)
        strength = SHADOW * np.exp(-height / 14)
        spread = half * (1 + height / 40)
        across = np.exp(-(((columns - x[:, None]) / spread[:, None]) ** 2))
        below = slice(int(FLOOR) - _MARGIN, None)
        dark = (strength[:, None] * depth)[:, below, None] * across[:, None, :]
        frames[:, below] *= 1 - dark[..., None]


def _camera(look: Look, frames: int) -> np.ndarray:
    """(F, 2): the camera's offset in pixels to the right and down, a smooth random path."""
    if not look.shake:
        return np.zeros((frames, 2), np.float32)
    rng = np.random.default_rng([look.seed, 1])
    path = _smooth(frames, 6) @ rng.normal(size=(6, 2))
    path *= look.shake / np.sqrt((path**2).sum(1).mean())
    return np.clip(path, 1 - _MARGIN, _MARGIN - 1).astype(np.float32)


def _room(look: Look, camera: np.ndarray) -> np.ndarray:
    """The empty room as the camera sees it, (F, SIZE, SIZE, 3)."""
    room = _whole_room(look)
    if not look.shake:
        inner = slice(_MARGIN, _MARGIN + SIZE)
        return np.broadcast_to(room[inner, inner], (len(camera), SIZE, SIZE, 3)).copy()
    seen = np.empty((len(camera), SIZE, SIZE, 3), np.float32)
    for frame, (x, y) in enumerate(camera + _MARGIN):
        left, top = int(x), int(y)
        window = room[top : top + SIZE + 1, left : left + SIZE + 1]
        window = window[:-1] + (y - top) * (window[1:] - window[:-1])
        seen[frame] = window[:, :-1] + (x - left) * (window[:, 1:] - window[:, :-1])
    return seen


def _whole_room(look: Look) -> np.ndarray:
    """The room with its margins, (SIZE + 2 _MARGIN, SIZE + 2 _MARGIN, 3) in [0, 1]."""
    rng = np.random.default_rng([look.seed, 0])
    side = SIZE + 2 * _MARGIN
    axis = np.arange(side, dtype=np.float32) + 0.5 - _MARGIN
    slope = rng.uniform(-LIGHT, LIGHT, 2)
    light = 1 + (slope[0] * axis[:, None] + slope[1] * axis[None, :] - slope.sum() * 32) / SIZE
    wall, ground = (
        (rng.uniform(*level) + _texture(rng, side))[..., None] + _tint(rng)
        for level in (WALL, GROUND)
    )
    for _ in range(look.clutter):
        _hang_clutter(wall, rng, axis)
    above = np.clip(FLOOR - axis + 0.5, 0.0, 1.0)[:, None, None]
    return ((ground + above * (wall - ground)) * light[..., None]).astype(np.float32)


def _hang_clutter(wall: np.ndarray, rng: np.random.Generator, axis: np.ndarray) -> None:
    """Hang a rectangle or a disc on the wall that is a little darker or lighter."""
    x, y, half = rng.uniform(0, SIZE), rng.uniform(0, FLOOR - 14), rng.uniform(4, 11, 2)
    dx, dy = np.abs(axis - x)[None, :] / half[0], np.abs(axis - y)[:, None] / half[1]
    away = np.maximum(dx, dy) if rng.random() < 0.5 else np.sqrt(dx**2 + dy**2)
    cover = np.clip((1 - away) * half.mean() + 0.5, 0.0, 1.0)
    wall += (rng.uniform(0.4, 1) * rng.choice([-1, 1]) * CLUTTER * cover)[..., None]


def _texture(rng: np.random.Generator, side: int) -> np.ndarray:
    """Smooth noise, in waves of 8 pixels or more."""
    knots = int(rng.integers(4, 11))
    field = _smooth(side, knots) @ rng.normal(size=(knots, knots)) @ _smooth(side, knots).T
    return rng.uniform(0.3, 1) * TEXTURE * field / np.abs(field).max()


def _tint(rng: np.random.Generator) -> np.ndarray:
    """A random offset from gray that does not change brightness."""
    colour = rng.normal(size=3)
    colour -= colour.mean()
    return rng.uniform(0, TINT) * colour / np.linalg.norm(colour)


def _smooth(count: int, knots: int) -> np.ndarray:
    """(count, knots): weights that interpolate `knots` values smoothly at `count` points."""
    at = np.linspace(0, knots - 1, count)[:, None] - np.arange(knots)
    weights = np.exp(-(at**2))
    return weights / weights.sum(1, keepdims=True)
