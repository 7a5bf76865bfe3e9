"""The renderer: a scene's trajectory to anti-aliased RGB frames, all frames of a clip at once."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from videorepa.lab.scenarios import SCENARIOS
from videorepa.lab.world import COLOURS, FLOOR, FRAMES, SIZE, Scene, Trajectory, simulate

BACKGROUND = np.array([0.93, 0.93, 0.91], np.float32)
GROUND = np.array([0.45, 0.40, 0.36], np.float32)
SCREEN = np.array([0.60, 0.62, 0.65], np.float32)

_AXIS = np.arange(SIZE, dtype=np.float32) + 0.5
EMPTY_ROOM = np.where((_AXIS > FLOOR)[:, None, None], GROUND, BACKGROUND).repeat(SIZE, axis=1)


@dataclass(frozen=True)
class Clip:
    """A captioned clip with its ground truth.

    frames: (FRAMES, SIZE, SIZE, 3) uint8 RGB.
    """

    frames: np.ndarray
    scene: Scene
    trajectory: Trajectory

    @property
    def caption(self) -> str:
        return self.scene.caption


def render(scene: Scene, trajectory: Trajectory) -> np.ndarray:
    """Draw the scene: (frames, SIZE, SIZE, 3) uint8. A pixel's coverage by a shape is taken from
    its centre's signed distance to the edge, which is exact to a few percent for these sizes."""
    frames = np.broadcast_to(EMPTY_ROOM, (len(trajectory.positions), SIZE, SIZE, 3)).copy()
    for index, ball in enumerate(scene.balls):
        x, y = trajectory.positions[:, index, 0], trajectory.positions[:, index, 1]
        dx2 = (_AXIS - x[:, None]) ** 2
        dy2 = (_AXIS - y[:, None]) ** 2
        distance = np.sqrt(dy2[:, :, None] + dx2[:, None, :])
        cover = np.clip(ball.radius + 0.5 - distance, 0.0, 1.0)
        # Only the pixels that the ball touches are mixed: they are a small part of the clip.
        hit = np.nonzero(cover)
        weight = cover[hit][:, None]
        frames[hit] += weight * (np.array(COLOURS[ball.colour], np.float32) - frames[hit])
    if scene.screen is not None:
        across = np.clip(
            np.minimum(_AXIS - scene.screen.left, scene.screen.right - _AXIS) + 0.5, 0, 1
        )
        down = np.clip(np.minimum(_AXIS - scene.screen.top, FLOOR - _AXIS) + 0.5, 0, 1)
        cover = (down[:, None] * across[None, :])[..., None].astype(np.float32)
        frames += cover * (SCREEN - frames)
    return (frames * 255.0 + 0.5).astype(np.uint8)


def draw_scene(seed: int, index: int, scenario: str | None = None) -> Scene:
    """The scene number `index` of the endless series that `seed` names: always the same one.

    Without a scenario, one is drawn, all equally likely.
    """
    rng = np.random.default_rng([seed, index])
    drawn = list(SCENARIOS)[rng.integers(len(SCENARIOS))]
    return SCENARIOS[scenario or drawn](rng)


def make_clip(seed: int, index: int, scenario: str | None = None, frames: int = FRAMES) -> Clip:
    """The clip of that scene; see `draw_scene`."""
    scene = draw_scene(seed, index, scenario)
    trajectory = simulate(scene, frames)
    return Clip(render(scene, trajectory), scene, trajectory)
