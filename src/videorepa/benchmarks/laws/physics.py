"""Physical commonsense: how far a clip's bodies depart from each law."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from videorepa.benchmarks.laws.tracking import NEAR_FLOOR, Observation, Track
from videorepa.world.simulator import GRAVITY, SIZE

NEAR_BODY = 2.0
"""Pixels between two bodies up to which they count as touching."""

BRAKE = 0.45
"""Largest deceleration of a sliding box by friction, in pixels per frame squared."""

STIRRED = 2.0
"""Pixels that something has to move for a clip to test any law. A clip in which nothing moves
neither breaks nor obeys one."""


def _runs(flags: np.ndarray) -> Iterator[slice]:
    """The runs of True."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(start), int(stop))


def _largest(values: Sequence[float]) -> float | None:
    """The largest value, or 0 if all are negative; None without any."""
    return max(0.0, *map(float, values)) if values else None


def _touching(track: Track, others: Sequence[Track]) -> np.ndarray:
    """(F,) bool: the body may touch a plank or another body, just did, or is about to."""
    near = track.at_plank.copy()
    for other in others:
        if other is track:
            continue
        gap = np.linalg.norm(track.position - other.position, axis=1) - track.size - other.size
        # A body that approaches at 3 px/frame may touch between two frames.
        near |= np.nan_to_num(gap, nan=np.inf) < NEAR_BODY + 3.0
    return near


def _free_triples(track: Track, untouched: np.ndarray) -> np.ndarray:
    """(F,) bool: the body is in free flight from the frame before to the frame after.

    A bounce happens between frames, unseen. So three frames count only if the floor was out of
    reach, extrapolating forward from the first two and backward from the last two.
    """
    height = np.where(track.whole & untouched, track.height, np.nan)
    free = np.zeros(len(height), bool)
    before, now, after = height[:-2], height[1:-1], height[2:]
    reach = np.minimum(2 * now - before - GRAVITY, 2 * now - after - GRAVITY)
    lowest = np.minimum.reduce([before, now, after, reach])
    free[1:-1] = np.nan_to_num(lowest, nan=-np.inf) > NEAR_FLOOR
    return free


def _flights(bodies: Sequence[Track]) -> Iterator[np.ndarray]:
    """Positions (n, 2) in every free flight of at least four frames."""
    for track in bodies:
        for run in _runs(_free_triples(track, ~_touching(track, bodies))):
            if run.stop - run.start >= 2:
                yield track.position[run.start - 1 : run.stop + 1]


def _gravity(bodies: Sequence[Track]) -> float | None:
    """|a - g| for the vertical acceleration a that fits all flights best.

    Each flight has its own start and velocity: y = y0 + v t + a t^2 / 2, by least squares.
    """
    along = information = 0.0
    for flight in _flights(bodies):
        time = np.arange(len(flight)) - (len(flight) - 1) / 2
        curve = time**2 / 2 - (time**2 / 2).mean()
        along += curve @ flight[:, 1]
        information += curve @ curve
    # 3.5 is one flight of five frames. With less, half a pixel of noise drowns gravity.
    return abs(along / information - GRAVITY) if information >= 3.5 else None


def _arc(bodies: Sequence[Track]) -> float | None:
    """Largest distance of a flight from a parabola of acceleration g."""
    worst = []
    for flight in _flights(bodies):
        time = np.arange(len(flight)) - (len(flight) - 1) / 2
        path = flight.copy()
        path[:, 1] -= GRAVITY * time**2 / 2
        worst.append(_off_line(time, path))
    return _largest(worst)


def _off_line(time: np.ndarray, path: np.ndarray) -> float:
    """Largest distance of a path, (n,) or (n, 2), from the uniform motion that fits it best."""
    design = np.stack([np.ones_like(time), time], 1)
    return float(np.abs(path - design @ np.linalg.lstsq(design, path, rcond=None)[0]).max())


@dataclass(frozen=True)
class _Phase:
    """Consecutive steps in which no body hits anything.

    Attributes:
        start: The first step.
        energy: Kinetic plus potential energy over the bodies' weight, v^2 / (2 g) + height in
            pixels: the median over the steps.
        velocity: Horizontal velocity of the bodies' common centre, likewise.
    """

    start: int
    energy: float
    velocity: float


def _phases(bodies: Sequence[Track]) -> list[_Phase]:
    """The phases in which all bodies are in full view and either in free flight or on the floor."""
    if not bodies:
        return []
    steps = len(bodies[0].visible) - 1
    valid, kind = np.ones(steps, bool), np.zeros(steps, int)
    energy, velocity, mass = np.zeros(steps), np.zeros(steps), 0.0
    for number, track in enumerate(bodies):
        untouched = ~_touching(track, bodies)
        triples = _free_triples(track, untouched)
        flying = triples[:-1] | triples[1:]
        low = np.abs(np.nan_to_num(track.height, nan=np.inf)) < NEAR_FLOOR
        low &= track.whole & untouched
        rolling = low[:-1] & low[1:] & ~flying
        valid &= flying | rolling
        kind += flying * 2**number
        speed = np.diff(track.position, axis=0)
        # In the middle of a step a flying ball is g / 8 above the mean of the step's two ends.
        height = (track.height[1:] + track.height[:-1]) / 2 + flying * GRAVITY / 8
        weight = track.size**2
        energy += weight * ((speed**2).sum(1) / 2 / GRAVITY + height)
        velocity += weight * speed[:, 0]
        mass += weight
    phases = []
    for run in _runs(valid):
        cuts = np.flatnonzero(np.diff(kind[run])) + 1
        for part in np.split(np.arange(run.start, run.stop), cuts):
            if len(part) >= 2:
                medians = (float(np.median(each[part]) / mass) for each in (energy, velocity))
                phases.append(_Phase(int(part[0]), *medians))
    return phases


def _energy(bodies: Sequence[Track]) -> float | None:
    """Largest growth of energy from one phase to a later one."""
    pairs = combinations(_phases(bodies), 2)
    return _largest([later.energy - earlier.energy for earlier, later in pairs])


def _exchange(bodies: Sequence[Track]) -> float | None:
    """Change of the balls' common velocity by their collisions.

    Boxes are left out, since friction takes momentum from them.
    """
    touching = np.flatnonzero(np.any([_touching(track, bodies) for track in bodies], axis=0))
    phases = _phases(bodies)
    if not len(touching) or any(track.is_box for track in bodies):
        return None
    before = [phase for phase in phases if phase.start < touching[0]]
    after = [phase for phase in phases if phase.start > touching[-1]]
    if not before or not after:
        return None
    return abs(after[0].velocity - before[-1].velocity)


def _momentum(bodies: Sequence[Track]) -> float | None:
    """Largest unexplained change of an untouched body's horizontal velocity between two steps.

    A bounce may take up to a third of the velocity, which is what it takes to set a sliding disc
    spinning. A box on the floor may brake by BRAKE. A box that tips over there is not tested.
    """
    worst = []
    for track in bodies:
        x = np.where(track.whole & ~_touching(track, bodies), track.position[:, 0], np.nan)
        speed = np.diff(x)
        change = np.diff(speed)
        height = track.height
        hit = ~_free_triples(track, np.ones(len(x), bool))[1:-1]
        hit &= np.fmax(height[:-2], height[2:]) > NEAR_FLOOR
        slower = np.sign(speed[:-1]) * change < 0
        allowed = np.where(hit & slower, np.abs(speed[:-1]) / 3, 0.0)
        if track.is_box:
            low = height < NEAR_FLOOR
            steady = np.ptp([height[:-2], height[1:-1], height[2:]], axis=0) < 1.0
            allowed = np.where(low[1:-1] & slower, BRAKE, allowed)
            allowed[low[1:-1] & ~steady] = np.inf
        excess = np.abs(change) - allowed
        worst.extend(excess[~np.isnan(excess)])
    return _largest(worst)


def _continuity(bodies: Sequence[Track]) -> float | None:
    """Largest amount by which a step is outside the range of the two steps around it.

    A body that hits something within a step moves with the velocity of the step before until the
    hit, and with that of the step after from then on. So the step is between those two, whatever
    was hit, up to gravity in height. If the frame's edge or the screen cuts a body, its visible
    centroid is somewhere within the body, which widens the range by the body's size.
    """
    worst = []
    for track in bodies:
        steps = np.diff(track.position, axis=0)
        before, now, after = steps[:-2], steps[1:-1], steps[2:]
        cut = np.convolve(track.visible & ~track.whole, np.ones(4), "valid") > 0
        room = np.array([0.0, GRAVITY]) + np.where(cut, track.size, 0.0)[:, None]
        excess = np.maximum(now - np.maximum(before, after), np.minimum(before, after) - now) - room
        worst.extend(excess[~np.isnan(excess)])
    return _largest(worst)


def _coasting(bodies: Sequence[Track]) -> float | None:
    """Largest distance of an untouched rolling ball from uniform motion, also behind the screen."""
    worst = []
    for track in bodies:
        if track.is_box:
            continue
        touching = _touching(track, bodies)
        untouched = np.cumsum(touching) == 0
        low = np.abs(np.nan_to_num(track.height, nan=np.inf)) < NEAR_FLOOR
        flown = np.cumsum(track.whole & ~low) > 0
        frames = np.flatnonzero(track.whole & untouched & low & ~flown)
        if len(frames) >= 3:
            worst.append(_off_line(frames.astype(float), track.position[frames, 0]))
    return _largest(worst)


def _presence(bodies: Sequence[Track]) -> float:
    """How much the farthest movement of any body falls short of STIRRED."""
    paths = [track.position[track.visible] for track in bodies if track.visible.any()]
    farthest = [np.linalg.norm(path - path[0], axis=1).max() for path in paths]
    return max(0.0, STIRRED - float(max(farthest, default=0.0)))


def _permanence(seen: Observation) -> float:
    """The most frames in which any one body is missing without reason."""
    return float(max((_missing(track, seen).sum() for track in seen.bodies), default=0))


def _missing(track: Track, seen: Observation) -> np.ndarray:
    """(F,) bool: frames in which the body should be visible but is not.

    A body may be out of sight if, at constant velocity, it would be out of the frame or behind the
    screen: extrapolated from when it was last seen, or back from when it is seen again.
    """
    count = len(track.visible)
    missing = np.zeros(count, bool)
    for gap in _runs(~track.visible):
        frames = np.arange(gap.start, gap.stop)
        excused = np.zeros(len(frames), bool)
        for sighting, step in ((gap.start - 1, -1), (gap.stop, 1)):
            if 0 <= sighting < count:
                excused |= _may_be_hidden(track, seen, sighting, step, frames)
        missing[gap] = ~excused
    return missing


def _may_be_hidden(
    track: Track, seen: Observation, sighting: int, step: int, frames: np.ndarray
) -> np.ndarray:
    """(len(frames),) bool: whether the body could be out of sight in each of the frames.

    Args:
        sighting: A frame in which the body is visible.
        step: -1 to extrapolate from that frame and those before it, +1 from those after it.
    """
    history = [sighting + step * back for back in range(8)]
    history = [f for f in history if 0 <= f < len(track.visible) and track.visible[f]]
    # A body that is cut seems to move at half its speed, so prefer frames that show all of it.
    whole = [f for f in history if track.whole[f]]
    base = (whole if len(whole) >= 2 else history)[:4]
    if len(base) < 2:
        return np.full(len(frames), bool(track.at_edge[sighting] or track.at_screen[sighting]))
    velocity = (track.position[base[0]] - track.position[base[-1]]) / (base[0] - base[-1])
    time = frames - base[0]
    x = track.position[base[0], 0] + velocity[0] * time
    slack = 3.0 + 0.1 * np.abs(velocity[0] * time)
    hidden = (x < slack) | (x > SIZE - slack)
    # It leaves over the top edge only in flight.
    hidden |= track.position[base[0], 1] + velocity[1] * time + GRAVITY * time**2 / 2 < slack
    if seen.screen is not None and track.position[base[0], 1] - track.size > seen.screen.top - 2:
        inside = track.size - 2.0 - slack
        hidden |= (x > seen.screen.left + inside) & (x < seen.screen.right - inside)
    return hidden


def _size(bodies: Sequence[Track]) -> float | None:
    """Largest relative change of a body's radius."""
    changes = [np.abs(t.radius[t.whole] / t.size - 1).max() for t in bodies if t.whole.any()]
    return _largest(changes)


def _shape(bodies: Sequence[Track]) -> float | None:
    """Largest relative change of a body's elongation."""
    shapes = [track.elongation[track.whole] for track in bodies if track.whole.any()]
    changes = [np.abs(shape / np.median(shape) - 1).max() for shape in shapes]
    return _largest(changes)


def _one_piece(bodies: Sequence[Track]) -> float | None:
    """Largest stray piece of a body's colour, in square pixels."""
    # A ball behind a narrow screen is visible on both sides at once.
    pieces = [track.stray[~track.at_screen].max(initial=0.0) for track in bodies]
    return _largest(pieces)


def _floor(bodies: Sequence[Track]) -> float | None:
    """How deep a body is in the floor."""
    # A ball cut by a side still shows its lowest point, but its centroid is wrong.
    depths = [-track.height[track.whole].min() for track in bodies if track.whole.any()]
    return _largest(depths)


def _overlap(bodies: Sequence[Track]) -> float | None:
    """How deep two balls are in each other."""
    depths = []
    for one, two in combinations([track for track in bodies if not track.is_box], 2):
        both = one.whole & two.whole
        distance = np.linalg.norm(one.position - two.position, axis=1)[both]
        depths.extend(one.size + two.size - distance)
    return _largest(depths)


def path_length(seen: Observation) -> float:
    """Length of a body's visible path in pixels, as a mean over bodies."""
    lengths = [
        np.linalg.norm(np.diff(track.position[track.visible], axis=0), axis=1).sum()
        for track in seen.bodies
    ]
    return float(np.mean(lengths)) if lengths else 0.0


def deviations(seen: Observation) -> dict[str, float | None]:
    """How far the clip departs from each law.

    Returns:
        The value of every PC check, in the unit that `checks.CHECKS` names, or None for a check
        that does not apply to the clip.
    """
    bodies = seen.bodies
    return {
        "presence": _presence(bodies),
        "gravity": _gravity(bodies),
        "arc": _arc(bodies),
        "energy": _energy(bodies),
        "permanence": _permanence(seen) if bodies else None,
        "extras": float(seen.foreign_area(bodies).max()),
        "size": _size(bodies),
        "shape": _shape(bodies),
        "one_piece": _one_piece(bodies),
        "floor": _floor(bodies),
        "momentum": _momentum(bodies),
        "continuity": _continuity(bodies),
        "coasting": _coasting(bodies),
        "exchange": _exchange(bodies),
        "overlap": _overlap(bodies),
    }
