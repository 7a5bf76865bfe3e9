"""PhyWorld's three tasks (arXiv 2411.02385): uniform motion, parabola and collision.

They measure how far a model follows a law inside and outside its training range: the model gets the
first frames of a clip, and the velocity of what it generates next is compared with the law's. The
world is 10 wide and 10 high, y points up, and frames are 0.1 seconds apart. Motion is computed in
closed form, whereas the published clips were simulated by Box2D in a hundred steps per second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, UInt8

from videorepa.errors import UserError

Task = Literal["uniform", "parabola", "collision"]

Group = Literal["in", "r_out", "v_out", "rv_out"]
"""Whether radii (r), velocities (v) or both (rv) are outside the training range."""

WORLD = 10.0

INTERVAL = 0.1

FRAMES, SHOWN = 32, 3
"""Frames of a clip, and how many of them a model gets at least. The last frame is not scored."""

GRAVITY = 2.5

SOFT = 0.03
"""Share of the squared radius over which a ball's edge fades out."""

RADII: dict[Task, tuple[float, float]] = {
    "uniform": (0.7, 1.4),
    "parabola": (0.7, 1.4),
    "collision": (0.5, 1.5),
}

SPEEDS = (1.0, 4.0)

SMALL_RADII: dict[Task, tuple[float, float]] = {
    "uniform": (0.3, 0.6),
    "parabola": (0.3, 0.6),
    "collision": (0.3, 0.4),
}

LARGE_RADII: dict[Task, tuple[float, float]] = {
    "uniform": (1.5, 2.0),
    "parabola": (1.5, 2.0),
    "collision": (1.7, 2.0),
}

OUTER_SPEEDS = ((0.0, 0.8), (4.5, 6.0))

FPS = 5
"""Frame rate of the video files, which is not the world's."""

LEAST_IN_VIEW = 24
"""Frames for which a single ball stays wholly in view, if it is slow enough."""

LEAST_APART = 8
"""Fewest frames before and after a collision."""

EDGE = 0.5
"""Distance of balls from the floor and the ceiling, and the room for a start that has no other."""


@dataclass(frozen=True)
class Motion:
    """What happens in a clip.

    Attributes:
        radii: One for each ball. In a collision the first comes from the left.
        speeds: One for each ball.
        centres: (FRAMES, balls, 2), x and y.
    """

    task: Task
    radii: tuple[float, ...]
    speeds: tuple[float, ...]
    centres: np.ndarray

    @property
    def counts(self) -> bool:
        """Whether published tables include it. They leave out balls too small to measure well."""
        if self.task == "collision":
            return min(self.radii) > 0.5
        return self.radii[0] >= 0.6

    @property
    def group(self) -> Group:
        out = [
            any(not low <= value <= high for value in values)
            for values, (low, high) in ((self.radii, RADII[self.task]), (self.speeds, SPEEDS))
        ]
        groups: dict[tuple[bool, bool], Group] = {
            (False, False): "in",
            (True, False): "r_out",
            (False, True): "v_out",
            (True, True): "rv_out",
        }
        return groups[out[0], out[1]]


def draw_motion(task: Task, group: Group, rng: np.random.Generator) -> Motion:
    """Draw a motion of a group as the published code does.

    A value outside the range is below it or above it with equal probability. In half of the
    collisions the first ball's values alone are outside, in the others both balls'. Radii and
    speeds that leave no room for LEAST_APART frames before a collision are drawn anew.
    """
    balls = 2 if task == "collision" else 1
    while True:
        outer = 1 if rng.random() < 0.5 else balls
        radii_outer = outer if group in ("r_out", "rv_out") else 0
        speeds_outer = outer if group in ("v_out", "rv_out") else 0
        around = (SMALL_RADII[task], LARGE_RADII[task])
        radii = _values(RADII[task], around, radii_outer, balls, rng)
        speeds = _values(SPEEDS, OUTER_SPEEDS, speeds_outer, balls, rng)
        if task == "collision":
            centres = _meeting(radii, speeds, rng)
        else:
            centres = _alone(task, radii[0], speeds[0], rng)
        if centres is not None:
            return Motion(task, tuple(radii.tolist()), tuple(speeds.tolist()), centres)


Span = tuple[float, float]


def _values(
    within: Span, around: tuple[Span, Span], outer: int, balls: int, rng: np.random.Generator
) -> np.ndarray:
    """A value for each ball, those of the first `outer` outside the range."""
    spans = [around[rng.integers(2)] if ball < outer else within for ball in range(balls)]
    return np.array([rng.uniform(*span) for span in spans])


def _alone(task: Task, radius: float, speed: float, rng: np.random.Generator) -> np.ndarray:
    """Centres of uniform motion or a parabola from a random start."""
    time = INTERVAL * np.arange(FRAMES)
    last = WORLD - radius - speed * INTERVAL * LEAST_IN_VIEW
    if last < radius:  # It leaves earlier, wherever it starts.
        last = radius + rng.uniform(0, EDGE)
    x = rng.uniform(radius, last) + speed * time
    if task == "uniform":
        y = np.full(FRAMES, _height(radius, rng))
    else:
        top = WORLD - EDGE - radius - rng.uniform(0, 1)
        y = top - GRAVITY * time**2 / 2
    return np.stack([x, y], 1)[:, None]


def _height(radius: float, rng: np.random.Generator) -> float:
    return rng.uniform(radius + EDGE, WORLD - EDGE - radius)


def _meeting(radii: np.ndarray, speeds: np.ndarray, rng: np.random.Generator) -> np.ndarray | None:
    """Centres of a collision from a random start; None if there is no room for one.

    The collision of balls whose radii differ more than twofold comes early. If the right one is
    the larger, it starts near the right wall, so that the small one stays in view.
    """
    touch = radii.sum()
    least = touch + INTERVAL * LEAST_APART * speeds.sum()
    most = touch + INTERVAL * (FRAMES - LEAST_APART) * speeds.sum()
    if radii.max() > 2 * radii.min():
        most = min(most, 1.25 * least)
    most = min(most, WORLD - touch)
    if least > most:
        return None
    apart = rng.uniform(least, most)
    last = WORLD - radii[1] - apart
    first = last - EDGE if radii[1] > 2 * radii[0] else radii[0]
    left = max(rng.uniform(first, last), radii[0])
    x = _collide(left, left + apart, radii, speeds, INTERVAL * np.arange(FRAMES))
    return np.stack([x, np.full_like(x, _height(radii.max(), rng))], -1)


def _collide(
    left: float, right: float, radii: np.ndarray, speeds: np.ndarray, time: np.ndarray
) -> Float[np.ndarray, "f 2"]:
    """Where two discs are that collide elastically, whose masses are their areas.

    A disc's velocity becomes 2 (m1 v1 + m2 v2) / (m1 + m2) less its velocity before.
    """
    impact = (right - left - radii.sum()) / speeds.sum()
    mass, before = radii**2, speeds * (1, -1)
    after = 2 * (mass @ before) / mass.sum() - before
    elapsed = time[:, None]
    x = np.array([left, right]) + before * np.minimum(elapsed, impact)
    return x + after * np.maximum(elapsed - impact, 0)


def render(motion: Motion, size: int = 256, count: int = FRAMES) -> UInt8[np.ndarray, "f h w 3"]:
    """Draw the first frames: a red and then a blue ball with soft edges, on white."""
    axis = np.linspace(0, WORLD, size, dtype=np.float32)
    frames = np.ones((count, size, size, 3), np.float32)
    for number, colour in zip(range(len(motion.radii)), ((1, 0, 0), (0, 0, 1)), strict=False):
        squared = motion.radii[number] ** 2
        for frame, (x, y) in zip(frames, motion.centres[:count, number], strict=True):
            # The first row is the top of the world.
            away = (axis[::-1, None] - y) ** 2 + (axis[None, :] - x) ** 2
            cover = np.clip((squared - away) / (SOFT * squared), 0, 1)[..., None]
            frame += cover * (np.array(colour, np.float32) - frame)
    return (frames * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class BallTrack:
    """A ball as a clip shows it.

    Attributes:
        centre: (F, 2), x and y in world units.
        radius: (F,) in world units.
    """

    centre: np.ndarray
    radius: np.ndarray


def read(
    frames: UInt8[np.ndarray, "f h w 3"], balls: int, *, compat: bool = False
) -> list[BallTrack]:
    """Locate the balls in square frames: the first is red, the second blue.

    A ball that is out of view counts as being at the side by which it leaves, as high and as large
    as before.

    Args:
        frames: RGB.
        balls: The number of balls, 1 or 2.
        compat: Divide columns by the width, as published, instead of by the width less 1. This
            makes velocities too small by 1 / width, so it serves only to compare with published
            numbers, at their frame size.
    """
    width = frames.shape[2]
    scale = WORLD / (width if compat else width - 1)
    bright: np.ndarray = np.greater(frames, 127)
    red = bright[..., 0] & ~bright[..., 1] & ~bright[..., 2]
    blue = ~bright[..., 0] & ~bright[..., 1] & bright[..., 2]
    # After a collision a ball leaves by the side from which it came.
    leaves_at = (WORLD,) if balls == 1 else (0.0, WORLD)
    return [_track(mask, scale, side) for mask, side in zip((red, blue), leaves_at, strict=False)]


def _track(mask: Bool[np.ndarray, "f h w"], scale: float, leaves_at: float) -> BallTrack:
    centre, radius = np.zeros((len(mask), 2)), np.zeros(len(mask))
    for frame, seen in enumerate(mask):
        rows, columns = np.nonzero(seen)
        if len(rows):
            height = (seen.shape[0] - 1 - rows.mean()) * scale
            centre[frame] = columns.mean() * scale, height
            radius[frame] = np.sqrt(len(rows) / np.pi) * scale
        else:
            centre[frame] = leaves_at, centre[frame - 1, 1] if frame else 0.0
            radius[frame] = radius[frame - 1] if frame else 0.0
    return BallTrack(centre, radius)


def velocity_error(
    frames: UInt8[np.ndarray, "f h w 3"],
    motion: Motion,
    *,
    compat: bool = False,
    shown: int = SHOWN,
) -> float:
    """PhyWorld's headline error, |mean v - true v| of the horizontal velocity.

    In uniform motion and parabolas the true velocity is the initial one. In a collision it is the
    true mean, and the error is averaged over before and after and over both balls; the step in
    which they meet is neither. Only frames count in which the true balls are wholly in the world.

    Args:
        frames: The whole clip, (FRAMES, size, size, 3) uint8.
        compat: See `read`.
        shown: How many first frames the model was shown. The others but the last are scored.

    Returns:
        The error in world units per second, or NaN if no frame can be scored.
    """
    radii = np.array(motion.radii)[:, None]
    inside = (motion.centres >= radii) & (motion.centres <= WORLD - radii)
    whole = np.all(inside, axis=(1, 2))
    whole[:shown] = whole[FRAMES - 1 :] = False
    kept = whole[1:] & whole[:-1]
    tracks = read(frames, len(radii), compat=compat)
    x = np.stack([track.centre[:, 0] for track in tracks], 1)
    velocity, true = (np.diff(of, axis=0) / INTERVAL for of in (x, motion.centres[..., 0]))
    if motion.task != "collision":
        true[:], phases = motion.speeds, [kept]
    else:
        step = np.arange(len(kept))
        meet = _meeting_step(true)
        phases = [kept & (step < meet), kept & (step > meet)]
    errors = [
        np.abs(velocity[phase].mean(0) - true[phase].mean(0)) for phase in phases if phase.any()
    ]
    return float(np.mean(errors)) if errors else float("nan")


def _meeting_step(velocity: Float[np.ndarray, "s 2"]) -> int:
    """The step in which the balls of a collision meet: the first with another velocity than the
    step before it, to 0.1, as published."""
    changes = (np.abs(np.diff(velocity, axis=0)) > 0.1).any(1)
    return int(changes.argmax()) + 1 if changes.any() else len(velocity)


# The names of motions.


Split = Literal["train", "test"]
"""What a motion is for. A motion of one split is none of the other's, whatever their seeds."""

SERIES = [(task, group) for task in get_args(Task) for group in get_args(Group)]

NAME = re.compile(
    r"(?P<split>train|test)-(?P<task>[a-z]+)-(?P<group>[a-z_]+)-(?P<seed>\d+)-(?P<number>\d+)"
)
"""The pattern of a motion's name, such as test-collision-v_out-0-0012."""


def names(
    split: Split, count: int, seed: int, groups: Sequence[Group] = get_args(Group)
) -> list[str]:
    """Names of motions. The tasks, and these groups of them, take turns."""
    series = [one for one in SERIES if one[1] in groups]
    turns = (divmod(index, len(series)) for index in range(count))
    return ["-".join((split, *series[place], str(seed), f"{turn:04d}")) for turn, place in turns]


def drawn(name: str) -> Motion:
    """The motion of a name. A name always has the same one.

    Raises:
        UserError: The name is not a motion's.
    """
    split, task, group, seed, number = parsed(name)
    # The split comes first, since a long seed takes two of the generator's words.
    stream = [get_args(Split).index(split), seed, SERIES.index((task, group)), number]
    return draw_motion(task, group, np.random.default_rng(stream))


def parsed(name: str) -> tuple[Split, Task, Group, int, int]:
    """Split, task, group, seed and number of a motion's name.

    Raises:
        UserError: The name is not a motion's.
    """
    match = NAME.fullmatch(name)
    for split, (task, group) in product(get_args(Split), SERIES):
        if match and (match["split"], match["task"], match["group"]) == (split, task, group):
            return split, task, group, int(match["seed"]), int(match["number"])
    raise UserError(
        f"{name!r} is not the name of a PhyWorld motion; expected SPLIT-TASK-GROUP-SEED-NUMBER, "
        "such as test-uniform-in-0-0003 (`videorepa lab phyworld` draws the clips)."
    )
