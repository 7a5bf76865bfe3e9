"""PhyWorld's three tasks (arXiv 2411.02385): uniform motion, parabola and collision.

How far a model follows a law inside and outside its training range: it is shown the first frames of
a clip, and the velocity of what it draws next is compared with the law's. The world is 10 wide and
10 high, y points up, and frames are 0.1 apart. Motion is exact here, where the published clips take
a hundred steps of Box2D a second.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Bool, Float, UInt8

from videorepa.errors import UserError

Task = Literal["uniform", "parabola", "collision"]

Group = Literal["in", "r_out", "v_out", "rv_out"]
"""Radii and velocities in the training range, or either or both outside of it."""

WORLD = 10.0

INTERVAL = 0.1

FRAMES, SHOWN = 32, 3
"""Frames in a clip, and those that the model is given; the last is not scored either."""

GRAVITY = 2.5

SOFT = 0.03
"""Share of the squared radius over which a ball's edge fades."""

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
"""Of the video files; the world knows nothing of it."""

LEAST_IN_VIEW = 24
"""Frames that the centre of a single ball stays in view for, if it can."""

LEAST_APART = 8
"""Frames before and after a collision."""

TRIES = 50


@dataclass(frozen=True)
class Motion:
    """What happens in a clip.

    radii, speeds: one for each ball; in a collision the first comes from the left and the second
    from the right. centres: (FRAMES, balls, 2), x and y.
    """

    task: Task
    radii: tuple[float, ...]
    speeds: tuple[float, ...]
    centres: np.ndarray

    @property
    def counts(self) -> bool:
        """Whether the published tables count it: balls too small to be read well are left out."""
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
    """A motion of the group. Outside of the range, a number is below or above it with equal chance,
    in a collision for both balls alike. A collision that comes too early or too late is started
    elsewhere, and after TRIES starts it gets other radii and speeds."""
    while True:
        large, fast = rng.random(2) < 0.5
        outer = LARGE_RADII if large else SMALL_RADII
        balls = 2 if task == "collision" else 1
        radii = rng.uniform(*(outer if group in ("r_out", "rv_out") else RADII)[task], balls)
        ranged = OUTER_SPEEDS[int(fast)] if group in ("v_out", "rv_out") else SPEEDS
        speeds = rng.uniform(*ranged, balls)
        for _ in range(TRIES):
            centres = _start(task, radii, speeds, rng)
            if centres is not None:
                return Motion(task, tuple(radii.tolist()), tuple(speeds.tolist()), centres)


def _start(
    task: Task, radii: np.ndarray, speeds: np.ndarray, rng: np.random.Generator
) -> np.ndarray | None:
    """Centres of a motion that starts at a random place, or None if that shows too little."""
    time = INTERVAL * np.arange(FRAMES)
    if task == "collision":
        left = rng.uniform(radii[0], WORLD / 2)
        right = rng.uniform(WORLD / 2, WORLD - radii[1])
        return _collide(left, right, radii, speeds, time)
    (radius,), (speed,) = radii, speeds
    # What is too fast for that starts at the left edge.
    last = max(radius, WORLD - speed * time[LEAST_IN_VIEW - 1])
    x = rng.uniform(radius, last) + speed * time
    if task == "uniform":
        return np.stack([x, np.full(FRAMES, rng.uniform(radius, WORLD - radius))], 1)[:, None]
    top = 0.95 * WORLD - radius - rng.uniform(0, 1)
    return np.stack([x, top - GRAVITY * time**2 / 2], 1)[:, None]


def _collide(
    left: float, right: float, radii: np.ndarray, speeds: np.ndarray, time: np.ndarray
) -> np.ndarray | None:
    """An elastic collision of discs at the same height; their masses are their areas."""
    gap, closing = right - left - radii.sum(), speeds.sum()
    impact = gap / closing if closing else np.inf
    if not time[LEAST_APART] <= impact <= time[-1 - LEAST_APART]:
        return None
    mass, before = radii**2, speeds * (1, -1)
    after = 2 * (mass @ before) / mass.sum() - before
    elapsed = time[:, None]
    x = np.array([left, right]) + before * np.minimum(elapsed, impact)
    x = x + after * np.maximum(elapsed - impact, 0)
    return np.stack([x, np.full_like(x, WORLD / 2)], -1)


def render(motion: Motion, size: int = 256) -> UInt8[np.ndarray, "f h w 3"]:
    """Frames on white: the first ball is red, the second blue, and their edges are soft."""
    axis = np.linspace(0, WORLD, size, dtype=np.float32)
    frames = np.ones((FRAMES, size, size, 3), np.float32)
    for number, colour in zip(range(len(motion.radii)), ((1, 0, 0), (0, 0, 1)), strict=False):
        squared = motion.radii[number] ** 2
        for frame, (x, y) in zip(frames, motion.centres[:, number], strict=True):
            # The first row is the world's top.
            away = (axis[::-1, None] - y) ** 2 + (axis[None, :] - x) ** 2
            cover = np.clip((squared - away) / (SOFT * squared), 0, 1)[..., None]
            frame += cover * (np.array(colour, np.float32) - frame)
    return (frames * 255).round().astype(np.uint8)


@dataclass(frozen=True)
class Sight:
    """What a ball is seen as. centre: (F, 2). radius: (F,)."""

    centre: np.ndarray
    radius: np.ndarray


def read(frames: UInt8[np.ndarray, "f h w 3"], balls: int, *, compat: bool = False) -> list[Sight]:
    """Find the balls in square frames: the first red, the second blue.

    A ball that is not seen is at the side that it leaves by, and as high and large as before.
    compat: as published, where a column is divided by the width and not by the width less one, so
    that velocities come out too small by the difference: use it to compare with published numbers
    alone, and only at their size.
    """
    width = frames.shape[2]
    scale = WORLD / (width if compat else width - 1)
    bright: np.ndarray = np.greater(frames, 127)
    red = bright[..., 0] & ~bright[..., 1] & ~bright[..., 2]
    blue = ~bright[..., 0] & ~bright[..., 1] & bright[..., 2]
    # What a collision throws back leaves by the side that it came from.
    leaves_at = (WORLD,) if balls == 1 else (0.0, WORLD)
    return [_sight(mask, scale, side) for mask, side in zip((red, blue), leaves_at, strict=False)]


def _sight(mask: Bool[np.ndarray, "f h w"], scale: float, leaves_at: float) -> Sight:
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
    return Sight(centre, radius)


def velocity_error(
    frames: UInt8[np.ndarray, "f h w 3"], motion: Motion, *, compat: bool = False
) -> float:
    """PhyWorld's headline error, in world units per second; NaN if no frame can be scored.

    Of uniform motion and a parabola: how far the mean horizontal velocity is from the initial one.
    Of a collision: how far the mean velocity is from the true mean, before and after, averaged over
    both balls. Frames count in which the true ball is wholly in the world.

    frames: the whole clip, (FRAMES, size, size, 3), of which those from SHOWN on are judged.
    """
    scored = slice(SHOWN, FRAMES - 1)
    errors = []
    for number, sight in enumerate(read(frames, len(motion.radii), compat=compat)):
        truth, radius = motion.centres[scored, number], motion.radii[number]
        inside = np.all((truth >= radius) & (truth <= WORLD - radius), axis=1)
        both = inside[1:] & inside[:-1]
        true = np.diff(truth[:, 0]) / INTERVAL
        found = np.diff(sight.centre[scored, 0]) / INTERVAL
        if motion.task != "collision":
            errors += _off(found[both], motion.speeds[0])
            continue
        jumps = np.flatnonzero(np.abs(np.diff(true)) > 0.1)
        hit = int(jumps[0]) + 1 if len(jumps) else len(true)
        for phase in (slice(0, hit), slice(hit, None)):
            kept = both[phase]
            if kept.any():
                errors += _off(found[phase][kept], float(true[phase][kept].mean()))
    return float(np.mean(errors)) if errors else float("nan")


def _off(found: Float[np.ndarray, " n"], true: float) -> Sequence[float]:
    return [abs(float(found.mean()) - true)] if len(found) else []


# Names, and clips as files.


SERIES = [(task, group) for task in get_args(Task) for group in get_args(Group)]

NAME = re.compile(r"(?P<task>[a-z]+)-(?P<group>[a-z_]+)-(?P<seed>\d+)-(?P<number>\d+)")
"""Of a motion, such as collision-v_out-0-0012."""


def names(count: int, seed: int, groups: Sequence[Group] = get_args(Group)) -> list[str]:
    """Names of motions, the tasks and those groups in turn."""
    series = [one for one in SERIES if one[1] in groups]
    turns = (divmod(index, len(series)) for index in range(count))
    return ["-".join((*series[place], str(seed), f"{turn:04d}")) for turn, place in turns]


def drawn(name: str) -> Motion:
    """The motion of that name, ever the same. Raises UserError for what is no such name."""
    task, group, seed, number = parsed(name)
    series = SERIES.index((task, group))
    return draw_motion(task, group, np.random.default_rng([seed, series, number]))


def parsed(name: str) -> tuple[Task, Group, int, int]:
    """Its parts. Raises UserError."""
    found = NAME.fullmatch(name)
    for task, group in SERIES:
        if found and (found["task"], found["group"]) == (task, group):
            return task, group, int(found["seed"]), int(found["number"])
    raise UserError(
        f"{name!r} is not the name of a PhyWorld motion; expected TASK-GROUP-SEED-NUMBER, such as "
        "uniform-in-0-0003 (`videorepa lab phyworld` draws the clips)."
    )
