"""Ways to break a clip's physics on purpose: one law at a time, by degrees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from videorepa.world.render import Clip, render
from videorepa.world.simulator import FLOOR, GRAVITY, SIZE, Ball, Body, Box, Scene, simulate

IN_THE_AIR = ("fall", "drop", "throw", "catch")
"""Events in which gravity alone moves a ball."""

ON_THE_FLOOR = ("roll", "slide", "collide", "chain", "hide")

_STREAM = 2
"""Keeps the places where clips are broken apart from the draws of scenes and of contacts."""

LEAST_OFFSET = 0.5
"""Pixels by which a body has to be off in some frame for a clip to count as broken."""


@dataclass(frozen=True)
class Corruption:
    """A way to break a clip.

    Attributes:
        apply: Maps a clip, a generator and a strength to the broken frames, or to None for a clip
            that cannot be broken in this way.
        strengths: The strengths to try, in increasing order.
        unit: Unit of a strength.
        what: What happens, in words.
        caught_by: The checks that should detect it.
    """

    apply: Callable[[Clip, np.random.Generator, float], np.ndarray | None]
    strengths: tuple[float, ...]
    unit: str
    what: str
    caught_by: str

    def broken(self, clip: Clip, seed: int, index: int, strength: float) -> np.ndarray | None:
        """Break a clip of a series, in the same place by every strength.

        The place is drawn apart from the scene: the first draw of the scene's own stream chose its
        scenario, on which the place would then depend.

        Args:
            clip: The clip.
            seed: The seed of its series.
            index: Its number in the series.
            strength: By how much to break it.

        Returns:
            The broken frames, or None for a clip that cannot be broken in this way.
        """
        return self.apply(clip, np.random.default_rng([seed, index, _STREAM]), strength)

    def measured(self, strength: float) -> str:
        """Write a strength with its unit, such as "1 frame" or "0.1 of gravity"."""
        unit = self.unit.removesuffix("s") if strength == 1 else self.unit
        return f"{strength:g} {unit}".strip()


# Order of frames


def _shuffled(clip: Clip, rng: np.random.Generator, window: float) -> np.ndarray:
    frames = np.arange(len(clip.frames))
    parts = np.split(frames, range(int(window), len(frames), int(window)))
    return clip.frames[np.concatenate([rng.permutation(part) for part in parts])]


def _reversed(clip: Clip, rng: np.random.Generator, strength: float) -> np.ndarray:
    return clip.frames[::-1]


def _frozen(clip: Clip, rng: np.random.Generator, frames: float) -> np.ndarray:
    last = len(clip.frames) - 1 - int(frames)
    return clip.frames[np.arange(len(clip.frames)).clip(max=last)]


# Objects


def _vanishing(clip: Clip, rng: np.random.Generator, frames: float) -> np.ndarray | None:
    start = _random_visible_frame(clip, rng)
    if start is None:
        return None
    positions = clip.trajectory.positions.copy()
    positions[start : start + int(frames), 0, 0] -= 10.0 * SIZE
    return _with_positions(clip, positions)


def _swelling(clip: Clip, rng: np.random.Generator, share: float) -> np.ndarray | None:
    start = _random_visible_frame(clip, rng)
    body = clip.scene.bodies[0]
    if start is None:
        return None
    bodies = (_scaled(body, 1 + share), *clip.scene.bodies[1:])
    positions = clip.trajectory.positions.copy()
    # Keep its lowest point: sinking into the floor would break another law.
    assert isinstance(body, Ball | Box)
    positions[:, 0, 1] -= share * (body.radius if isinstance(body, Ball) else body.height / 2)
    swollen = render(
        replace(clip.scene, bodies=bodies), replace(clip.trajectory, positions=positions)
    )
    return np.concatenate([clip.frames[:start], swollen[start:]])


def _scaled(body: Body, by: float) -> Body:
    if isinstance(body, Ball):
        return replace(body, radius=by * body.radius)
    assert isinstance(body, Box)
    return replace(body, width=by * body.width, height=by * body.height)


# Motion


def _teleporting(clip: Clip, rng: np.random.Generator, pixels: float) -> np.ndarray | None:
    start = _random_visible_frame(clip, rng)
    if start is None:
        return None
    positions = clip.trajectory.positions.copy()
    positions[start:, 0, 0] -= _direction(positions) * pixels
    return _with_positions(clip, positions)


def _pushed(clip: Clip, rng: np.random.Generator, speed: float) -> np.ndarray | None:
    start = _random_visible_frame(clip, rng)
    if start is None or clip.scene.event not in ("roll", "throw", "hide"):
        return None
    positions = clip.trajectory.positions.copy()
    since = np.arange(len(positions) - start, dtype=np.float32)
    positions[start:, 0, 0] += _direction(positions) * speed * since
    return _with_positions(clip, positions)


def _direction(positions: np.ndarray) -> float:
    """The side towards which the first body moves: 1 for right, -1 for left."""
    return np.sign(positions[-1, 0, 0] - positions[0, 0, 0]) or 1.0


def _light(clip: Clip, rng: np.random.Generator, share: float) -> np.ndarray | None:
    if clip.scene.event not in IN_THE_AIR:
        return None
    return _simulated(clip, clip.scene, GRAVITY * (1 - share))


def _heavy(clip: Clip, rng: np.random.Generator, share: float) -> np.ndarray | None:
    return _light(clip, rng, -share)


def _bouncy(clip: Clip, rng: np.random.Generator, share: float) -> np.ndarray | None:
    if clip.scene.event not in ("fall", "drop"):
        return None
    first, *others = clip.scene.bodies
    return _simulated(
        clip, replace(clip.scene, bodies=(replace(first, elasticity=1 + share), *others)), GRAVITY
    )


# Penetration


def _sunken(clip: Clip, rng: np.random.Generator, pixels: float) -> np.ndarray | None:
    if clip.scene.event not in ON_THE_FLOOR:
        return None
    positions = clip.trajectory.positions.copy()
    positions[:, 0, 1] += pixels
    return _with_positions(clip, positions)


def _overlapping(clip: Clip, rng: np.random.Generator, pixels: float) -> np.ndarray | None:
    if clip.scene.event not in ("collide", "chain") or not clip.trajectory.touched[-1, 0, 1]:
        return None
    positions = clip.trajectory.positions.copy()
    towards = np.sign(positions[0, 1, 0] - positions[0, 0, 0])
    positions[:, 0, 0] += towards * pixels
    return _with_positions(clip, positions)


def _random_visible_frame(clip: Clip, rng: np.random.Generator) -> int | None:
    """A random frame from which the first body is in full view for three frames, or None.

    The frame is not among the first or last four, and the body is away from the screen.
    """
    positions, body = clip.trajectory.positions[:, 0], clip.scene.bodies[0]
    x, radius = positions[:, 0], np.sqrt(body.area / np.pi)
    seen = (x > radius + 2) & (x < SIZE - radius - 2) & (positions[:, 1] < FLOOR)
    if (screen := clip.scene.screen) is not None:
        seen &= (x < screen.left - radius - 2) | (x > screen.right + radius + 2)
    for_three = seen[:-2] & seen[1:-1] & seen[2:]
    frames = np.flatnonzero(for_three[4:-2]) + 4
    return int(rng.choice(frames)) if len(frames) else None


def _with_positions(clip: Clip, positions: np.ndarray) -> np.ndarray:
    return render(clip.scene, replace(clip.trajectory, positions=positions))


def _simulated(clip: Clip, scene: Scene, gravity: float) -> np.ndarray | None:
    moved = simulate(scene, len(clip.frames), gravity)
    off = np.linalg.norm(moved.positions - clip.trajectory.positions, axis=-1)
    return render(scene, moved) if off.max() > LEAST_OFFSET else None


CORRUPTIONS: dict[str, Corruption] = {
    "shuffled": Corruption(
        _shuffled,
        (2, 4, 17),
        "frames",
        "the frames are in random order within windows of this length",
        "`continuity` and `event`",
    ),
    "reversed": Corruption(
        _reversed,
        (1,),
        "",
        "the frames are in reverse order",
        "`direction` if the caption names a side, and `energy` if a bounce then gains height",
    ),
    "frozen": Corruption(
        _frozen,
        (4, 8, 12, 16),
        "frames",
        "nothing moves for this many frames at the end; 16 are the whole clip",
        "`presence` and `event` for the whole clip, otherwise `momentum`, `gravity` and `arc`",
    ),
    "vanishing": Corruption(
        _vanishing,
        (1, 2, 4, 8),
        "frames",
        "the first body is missing for this many frames in which it would be visible",
        "`permanence`",
    ),
    "swelling": Corruption(
        _swelling,
        (0.1, 0.2, 0.4, 0.8),
        "of its size",
        "from some frame on the first body is larger, with its lowest point unchanged",
        "`size`",
    ),
    "teleporting": Corruption(
        _teleporting,
        (2, 4, 8, 12),
        "px",
        "from some frame on the first body is this far behind on its path",
        "`continuity`",
    ),
    "pushed": Corruption(
        _pushed,
        (0.5, 1, 2, 4),
        "px/frame",
        "from some frame on an untouched ball is this much faster",
        "`momentum` and `coasting`",
    ),
    "light": Corruption(
        _light,
        (0.1, 0.25, 0.5, 0.75, 1),
        "of gravity",
        "a ball falls or flies with this much less gravity",
        "`gravity` and `arc`",
    ),
    "heavy": Corruption(
        _heavy,
        (0.1, 0.25, 0.5, 1),
        "of gravity",
        "a ball falls or flies with this much more gravity",
        "`gravity` and `arc`",
    ),
    "bouncy": Corruption(
        _bouncy,
        (0.05, 0.1, 0.2, 0.4),
        "of its speed",
        "a ball bounces off with this much more speed than it had before",
        "`energy`",
    ),
    "sunken": Corruption(
        _sunken,
        (1, 2, 4, 8),
        "px",
        "the first body moves this deep in the floor",
        "`floor`",
    ),
    "overlapping": Corruption(
        _overlapping,
        (1, 2, 4, 8),
        "px",
        "two balls collide only when they are this deep in each other",
        "`overlap`",
    ),
}
