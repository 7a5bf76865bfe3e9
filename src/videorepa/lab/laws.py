"""Measures whether a clip shows what its caption says, and whether it obeys the lab's laws.

Semantic adherence (SA) is about the caption, physical commonsense (PC) about the clip alone: PC
never reads the caption, so a clip of the wrong ball that moves rightly is physical. Every check is
one number, bad when large, against one tolerance. SA's thresholds define its words and stand
here; PC's tolerances are what real clips need after the autoencoder, and `calibration` finds them.

What these checks cannot know: a roll has no direction in time, so a reversed one is physical (SA's
`direction` catches it). Nor do they judge light, texture, or the shapes of the screen and the
planks.
"""

from __future__ import annotations

import importlib.resources
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations, pairwise
from typing import Literal

import numpy as np

from videorepa.errors import UserError
from videorepa.lab.scenarios import BYSTANDERS, CAPTIONS
from videorepa.lab.tracking import Observation, Track, observe
from videorepa.lab.world import COLOURS, FLOOR, GRAVITY, SIZE

TOLERANCES = "tolerances.json"

NEAR_FLOOR = 1.5
"""Pixels between a body and the floor up to which it counts as touching it."""
NEAR_BODY = 2.0
"""The same between two bodies."""
BRAKE = 0.45
"""Pixels per frame squared that friction takes from a sliding box at most."""
STIRRED = 2.0
"""Pixels that something has to move for a clip to test anything: one in which all lies still breaks
no law, and obeys none."""
MOVED = 4.0
"""Pixels from which on something has moved, in the captions' sense."""
TURNS_ABOVE = 4.0
"""Pixels over the floor at which the fastest ball may seem to turn: half of its way per frame,
and what a blurred ball's radius is off."""
BOUNCED = 3.0
"""Pixels that a ball has to rise again to have bounced."""
STOPPED = 0.5
"""Pixels per frame up to which something counts as stopped."""
SIDEWAYS = 1.5
"""Pixels from which on something has gone to a side."""


@dataclass(frozen=True)
class Definition:
    """What a check measures: its aspect, the unit of its value, and what the value is.

    resolution: in the same unit; no tolerance is smaller, however well real clips do.
    """

    aspect: Literal["sa", "pc"]
    unit: str
    meaning: str
    resolution: float = 0.0


CHECKS: dict[str, Definition] = {
    "objects": Definition("sa", "count", "named things missing, and others too many"),
    "event": Definition("sa", "px", "how much movement the named event lacks"),
    "direction": Definition("sa", "px", "how much movement to the named side is lacking"),
    "presence": Definition(
        "pc", "px", "how much movement is lacking for anything to be tested by it"
    ),
    "gravity": Definition("pc", "px/frame^2", "free flight's acceleration, distance from g", 0.05),
    "arc": Definition("pc", "px", "free flight's distance from a parabola of acceleration g", 0.25),
    "energy": Definition(
        "pc", "px of height", "growth of kinetic plus potential energy over g", 0.25
    ),
    "permanence": Definition("pc", "frames", "body not there, neither behind nor out of frame"),
    "extras": Definition("pc", "px^2", "largest thing that is neither a body nor the room", 6.0),
    "size": Definition("pc", "fraction", "change of a body's radius", 0.05),
    "shape": Definition("pc", "fraction", "change of a body's long to its short axis", 0.05),
    "one_piece": Definition(
        "pc", "px^2", "largest piece of a body's colour away from the body", 6.0
    ),
    "floor": Definition("pc", "px", "how deep a body is in the floor", 0.25),
    "momentum": Definition(
        "pc", "px/frame", "change of horizontal velocity that nothing caused", 0.25
    ),
    "continuity": Definition("pc", "px", "a step that the steps around it leave no room for", 0.25),
    "coasting": Definition(
        "pc", "px", "an untouched rolling ball's distance from even motion", 0.25
    ),
    "exchange": Definition(
        "pc", "px/frame", "change of all balls' mean momentum by collisions", 0.25
    ),
    "overlap": Definition("pc", "px", "how deep two balls are in each other", 0.25),
}


@dataclass(frozen=True)
class Check:
    """One measurement; unit and meaning are in CHECKS. One that does not apply has the value 0
    and passes."""

    value: float
    tolerance: float
    passed: bool
    applies: bool


@dataclass(frozen=True)
class Verdict:
    """sa, pc: whether all checks of that aspect pass. motion: see `path_length`."""

    sa: bool
    pc: bool
    checks: dict[str, Check]
    motion: float


# --- captions


@dataclass(frozen=True)
class Request:
    """What a caption asks for.

    colours: of the named bodies, those that the event is about first. shapes: "ball" or "box" of
    each. sign: +1 to the right, -1 to the left, 0 if it names no side.
    """

    event: str
    colours: tuple[str, ...]
    shapes: tuple[str, ...]
    sign: int


_NAMED = re.compile(f"({'|'.join(COLOURS)}) (ball|box)")


@cache
def _patterns() -> dict[str, re.Pattern[str]]:
    """For each event, what its captions look like, whatever the colours and the side."""
    colour, found = f"(?:{'|'.join(COLOURS)})", {}
    blanks = dict.fromkeys("abc", colour)
    also = "|".join(text.format(**blanks) for text in BYSTANDERS)
    for event, templates in CAPTIONS.items():
        # A group has to have a name of its own in every way to say it.
        ways = [
            text.format(**blanks, s=f"(?P<s{number}>left|right)")
            for number, text in enumerate(templates)
        ]
        found[event] = re.compile(f"(?:{'|'.join(ways)})(?:{also})?".replace(".", r"\."))
    return found


def parse_caption(caption: str) -> Request:
    """Read one of the lab's captions. Raises UserError for any other."""
    for event, pattern in _patterns().items():
        match = pattern.fullmatch(caption.strip())
        if match:
            colours, shapes = zip(*_NAMED.findall(caption), strict=True)
            side = next((side for side in match.groupdict().values() if side), None)
            return Request(event, colours, shapes, {"right": 1, "left": -1, None: 0}[side])
    raise UserError(
        f"Found the caption {caption!r}; the lab can judge its own captions only, such as "
        "'A red ball rolls to the left.' Take prompts from the lab benchmark."
    )


# --- semantic adherence: each function returns a shortfall, 0 if the caption is fulfilled


def _objects(seen: Observation, request: Request) -> float:
    bodies = {track.colour: track for track in seen.bodies}
    named = dict(zip(request.colours, request.shapes, strict=True))
    wrong = len(named.keys() ^ bodies.keys())
    wrong += sum(
        track.is_box != (named[colour] == "box")
        for colour, track in bodies.items()
        if colour in named and track.whole.any()
    )
    # A second body of the same colour has to stay for a while to be one too many.
    wrong += sum(int((track.components > 1).sum() >= 3) for track in bodies.values())
    return float(wrong + ((request.event == "hide") != (seen.screen is not None)))


def _event(seen: Observation, request: Request) -> float:
    tracks = [seen.tracks[colour] for colour in request.colours]
    if not all(track.is_body for track in tracks):
        return float(SIZE)
    return _EVENTS[request.event](tracks, seen, request.sign)


def _shift(track: Track) -> float:
    """How far to the right the body is at the end of where it started, in pixels."""
    x = track.position[track.visible, 0]
    return float(x[-1] - x[0])


def _down(track: Track) -> tuple[float, float]:
    """What a fall to the floor lacks, and how far the body rises after it; in pixels."""
    height = track.height[track.visible]
    # Between two frames a ball may touch the floor and leave again: over frames it seems to turn
    # a little above the floor, by what it covers in half a frame.
    above = height.min() - TURNS_ABOVE
    low = int(np.argmax(height <= max(TURNS_ABOVE, height.min())))
    rise = (height[low:] - np.minimum.accumulate(height[low:])).max()
    return max(2 * MOVED - (height[0] - height[low]), above, 0.0), rise


def _falls(tracks: list[Track], seen: Observation, sign: int) -> float:
    lacking, rise = _down(tracks[0])
    return max(lacking, BOUNCED - rise, 0.0)


def _drops(tracks: list[Track], seen: Observation, sign: int) -> float:
    lacking, rise = _down(tracks[0])
    return max(lacking, rise - BOUNCED, 0.0)


def _flies(tracks: list[Track], seen: Observation, sign: int) -> float:
    track = tracks[0]
    height = track.height[track.visible]
    airborne = (height > NEAR_FLOOR + 1).sum()
    return max(2 * MOVED - sign * _shift(track), float(4 - airborne), 0.0)


def _rolls(tracks: list[Track], seen: Observation, sign: int) -> float:
    track = tracks[0]
    height = track.height[track.whole]
    lifted = float(np.median(height)) - 2 * NEAR_FLOOR if len(height) else 0.0
    return max(2 * MOVED - abs(_shift(track)), lifted, 0.0)


def _slides(tracks: list[Track], seen: Observation, sign: int) -> float:
    last = np.abs(np.diff(tracks[0].position[-4:, 0]))
    moving = float(np.nan_to_num(last, nan=SIZE).mean()) - STOPPED
    return max(_rolls(tracks, seen, sign), moving, 0.0)


def _descends(tracks: list[Track], seen: Observation, sign: int) -> float:
    track = tracks[0]
    height = track.height[track.visible]
    on_ramp = float(2 - track.at_plank.sum())
    return max(MOVED - (height[0] - height.min()), on_ramp, 0.0)


def _hits(tracks: list[Track], seen: Observation, sign: int) -> float:
    """Each of them comes to the next, and that one moves on."""
    worst = 0.0
    for first, second in pairwise(tracks):
        together = first.visible & second.visible
        if not together.any():
            return float(SIZE)
        gap = np.linalg.norm(first.position - second.position, axis=1) - first.size - second.size
        approach = min(MOVED, gap[together][0]) - np.nanmin(gap)
        # Frames are coarse: at 3 px/frame the balls may turn up to 3 px apart.
        lacking = (MOVED / 2 - approach, np.nanmin(gap) - 4.0, MOVED / 2 - sign * _shift(second))
        worst = max(worst, *lacking)
    return float(worst)


def _topples(tracks: list[Track], seen: Observation, sign: int) -> float:
    """The first falls from above the second."""
    first, second = (track.position[track.visible, 1] for track in tracks[:2])
    fallen = first[-1] - first[0]
    return float(max(MOVED - (second[0] - first[0]), MOVED - fallen, 0.0))


def _is_caught(tracks: list[Track], seen: Observation, sign: int) -> float:
    """It falls and ends low between two planks."""
    track = tracks[0]
    x, y = track.position[track.visible][-1]
    height = track.height[track.visible]
    columns = np.flatnonzero(seen.planks[int(y) : int(FLOOR)].any(0))
    missing = 2 - int((columns < x).any()) - int((columns > x).any())
    lacking = (MOVED - (height[0] - height[-1]), height[-1] - 2 * MOVED, MOVED * missing)
    return float(max(*lacking, 0.0))


def _hides(tracks: list[Track], seen: Observation, sign: int) -> float:
    track = tracks[0]
    screen = seen.screen
    if screen is None:
        return float(SIZE)
    x = track.position[:, 0]
    left, right = (
        np.nonzero(track.visible & side)[0] for side in (x < screen.left, x > screen.right)
    )
    if not len(left) or not len(right):
        return MOVED
    before, after = sorted((left, right), key=lambda frames: frames[0])
    if before[-1] >= after[0]:
        return MOVED
    least = track.area[before[-1] : after[0] + 1].min() / (np.pi * track.size**2)
    # A ball that shows more than half of itself all the way has passed in front.
    return float(max(least - 0.5, 0.0) * 2 * track.size)


_EVENTS: dict[str, Callable[[list[Track], Observation, int], float]] = {
    "fall": _falls,
    "drop": _drops,
    "throw": _flies,
    "roll": _rolls,
    "slide": _slides,
    "ramp": _descends,
    "collide": _hits,
    "chain": _hits,
    "stack": _topples,
    "catch": _is_caught,
    "hide": _hides,
}


def _direction(seen: Observation, request: Request) -> float | None:
    if not request.sign:
        return None
    track = seen.tracks[request.colours[0]]
    return max(SIDEWAYS - request.sign * _shift(track), 0.0) if track.is_body else SIDEWAYS


# --- physical commonsense: each function returns a value, or None if the clip cannot be asked


def _runs(flags: np.ndarray) -> Iterator[slice]:
    """The stretches of True."""
    edges = np.flatnonzero(np.diff(np.r_[False, flags, False].astype(int)))
    for start, stop in zip(edges[::2], edges[1::2], strict=True):
        yield slice(int(start), int(stop))


def _touching(track: Track, others: Sequence[Track]) -> np.ndarray:
    """(F,) bool, frames in which a plank or another body may be touched, or just was, or is about
    to be."""
    near = track.at_plank.copy()
    for other in others:
        if other is track:
            continue
        gap = np.linalg.norm(track.position - other.position, axis=1) - track.size - other.size
        # What approaches at 3 px a frame touches between two frames.
        near |= np.nan_to_num(gap, nan=np.inf) < NEAR_BODY + 3.0
    return near


def _free_triples(track: Track, untouched: np.ndarray) -> np.ndarray:
    """(F,) bool: the body is in free flight from the frame before to the frame after.

    A body bounces between frames, unseen. So a triple counts only if the floor is out of reach:
    if neither from its first two frames on, nor from its last two back, would the body get there.
    """
    height = np.where(track.whole & untouched, track.height, np.nan)
    free = np.zeros(len(height), bool)
    before, now, after = height[:-2], height[1:-1], height[2:]
    reach = np.minimum(2 * now - before - GRAVITY, 2 * now - after - GRAVITY)
    lowest = np.minimum.reduce([before, now, after, reach])
    free[1:-1] = np.nan_to_num(lowest, nan=-np.inf) > NEAR_FLOOR
    return free


def _flights(bodies: Sequence[Track]) -> Iterator[np.ndarray]:
    """Positions (n, 2) of every stretch of free flight of at least four frames."""
    for track in bodies:
        for run in _runs(_free_triples(track, ~_touching(track, bodies))):
            if run.stop - run.start >= 2:
                yield track.position[run.start - 1 : run.stop + 1]


def _gravity(bodies: Sequence[Track]) -> float | None:
    """One acceleration is fitted to all flights, each with its own start and velocity."""
    along = information = 0.0
    for flight in _flights(bodies):
        time = np.arange(len(flight)) - (len(flight) - 1) / 2
        curve = time**2 / 2 - (time**2 / 2).mean()
        along += curve @ flight[:, 1]
        information += curve @ curve
    # 3.5 is one flight of five frames; with less, half a pixel of noise drowns gravity.
    return abs(along / information - GRAVITY) if information >= 3.5 else None


def _arc(bodies: Sequence[Track]) -> float | None:
    worst = []
    for flight in _flights(bodies):
        time = np.arange(len(flight)) - (len(flight) - 1) / 2
        path = flight.copy()
        path[:, 1] -= GRAVITY * time**2 / 2
        worst.append(_off_line(time, path))
    return max(worst) if worst else None


def _off_line(time: np.ndarray, path: np.ndarray) -> float:
    """Largest distance from even motion, the best fitting one; path is (n,) or (n, 2)."""
    design = np.stack([np.ones_like(time), time], 1)
    return float(np.abs(path - design @ np.linalg.lstsq(design, path, rcond=None)[0]).max())


@dataclass(frozen=True)
class _Phase:
    """A stretch in which no ball hits anything. energy: mean over its steps of kinetic plus
    potential energy by weight, in pixels of height; velocity: of the bodies' common centre."""

    start: int
    energy: float
    velocity: float


def _phases(bodies: Sequence[Track]) -> list[_Phase]:
    """Where all bodies are in full view and either in free flight or on the floor."""
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
        # At the middle of a step a flying ball is g/8 above the mean of the two ends.
        height = (track.height[1:] + track.height[:-1]) / 2 + flying * GRAVITY / 8
        weight = track.size**2
        energy += weight * ((speed**2).sum(1) / 2 / GRAVITY + height)
        velocity += weight * speed[:, 0]
        mass += weight
    found = []
    for run in _runs(valid):
        cuts = np.flatnonzero(np.diff(kind[run])) + 1
        for part in np.split(np.arange(run.start, run.stop), cuts):
            if len(part) >= 2:
                found.append(
                    _Phase(
                        int(part[0]),
                        float(np.median(energy[part]) / mass),
                        float(np.median(velocity[part]) / mass),
                    )
                )
    return found


def _energy(bodies: Sequence[Track]) -> float | None:
    phases = _phases(bodies)
    if len(phases) < 2:
        return None
    return max(
        0.0, max(later.energy - earlier.energy for earlier, later in combinations(phases, 2))
    )


def _exchange(bodies: Sequence[Track]) -> float | None:
    """Only balls that stay on the floor can be asked: friction takes momentum too."""
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
    """Largest change of horizontal velocity from one step to the next, of a body that touches no
    other. A bounce may take up to a third of it: that is what starts a sliding disc spinning. A box
    on the floor may brake, and one that tips over there is not asked."""
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
    return max(0.0, float(max(worst))) if worst else None


def _continuity(bodies: Sequence[Track]) -> float | None:
    """A ball that hits something within a step moves on with one velocity before the hit and
    another after it, so the step lies between the step before and the step after, whatever was
    hit; in height give or take gravity. What is seen of a ball that the frame's edge or the screen
    cuts has its centroid somewhere within the ball."""
    worst = []
    for track in bodies:
        steps = np.diff(track.position, axis=0)
        before, now, after = steps[:-2], steps[1:-1], steps[2:]
        cut = np.convolve(track.visible & ~track.whole, np.ones(4), "valid") > 0
        room = np.array([0.0, GRAVITY]) + np.where(cut, track.size, 0.0)[:, None]
        excess = np.maximum(now - np.maximum(before, after), np.minimum(before, after) - now) - room
        worst.extend(excess[~np.isnan(excess)])
    return max(0.0, float(max(worst))) if worst else None


def _coasting(bodies: Sequence[Track]) -> float | None:
    """Also across the screen: what comes out has to be where and when it was due."""
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
    return max(worst) if worst else None


def _presence(bodies: Sequence[Track]) -> float:
    ways = [track.position[track.visible] for track in bodies if track.visible.any()]
    farthest = [np.linalg.norm(way - way[0], axis=1).max() for way in ways]
    return max(0.0, STIRRED - float(max(farthest, default=0.0)))


def _permanence(seen: Observation) -> float:
    return float(max((_missing(track, seen).sum() for track in seen.bodies), default=0))


def _missing(track: Track, seen: Observation) -> np.ndarray:
    """(F,) bool, frames in which the ball should be seen and is not.

    It may be away where it was about to be out of the frame or behind the screen when last seen,
    or was so shortly before it was seen again, taking its velocity for constant.
    """
    count = len(track.visible)
    missing = np.zeros(count, bool)
    for gap in _runs(~track.visible):
        frames = np.arange(gap.start, gap.stop)
        excused = np.zeros(len(frames), bool)
        for known, step in ((gap.start - 1, -1), (gap.stop, 1)):
            if not 0 <= known < count:
                continue
            excused |= _may_be_hidden(track, seen, known, step, frames)
        missing[gap] = ~excused
    return missing


def _may_be_hidden(
    track: Track, seen: Observation, known: int, step: int, frames: np.ndarray
) -> np.ndarray:
    """For each of the frames: whether a ball seen in frame `known`, and before in the direction
    `step`, could be out of sight in it."""
    history = [known + step * back for back in range(8)]
    history = [f for f in history if 0 <= f < len(track.visible) and track.visible[f]]
    # A body that is cut seems to move at half its speed: rather ask the frames that show it all.
    whole = [f for f in history if track.whole[f]]
    base = (whole if len(whole) >= 2 else history)[:4]
    if len(base) < 2:
        return np.full(len(frames), bool(track.at_edge[known] or track.at_screen[known]))
    velocity = (track.position[base[0]] - track.position[base[-1]]) / (base[0] - base[-1])
    time = frames - base[0]
    x = track.position[base[0], 0] + velocity[0] * time
    slack = 3.0 + 0.1 * np.abs(velocity[0] * time)
    hidden = (x < slack) | (x > SIZE - slack)
    # Over the top edge it goes only in flight.
    hidden |= track.position[base[0], 1] + velocity[1] * time + GRAVITY * time**2 / 2 < slack
    if seen.screen is not None and track.position[base[0], 1] - track.size > seen.screen.top - 2:
        inside = track.size - 2.0 - slack
        hidden |= (x > seen.screen.left + inside) & (x < seen.screen.right - inside)
    return hidden


def _size(bodies: Sequence[Track]) -> float | None:
    changes = [np.abs(t.radius[t.whole] / t.size - 1).max() for t in bodies if t.whole.any()]
    return float(max(changes)) if changes else None


def _shape(bodies: Sequence[Track]) -> float | None:
    shapes = [track.elongation[track.whole] for track in bodies if track.whole.any()]
    changes = [np.abs(shape / np.median(shape) - 1).max() for shape in shapes]
    return float(max(changes)) if changes else None


def _one_piece(bodies: Sequence[Track]) -> float | None:
    # In front of a narrow screen a ball shows on both sides at once.
    pieces = [track.stray[~track.at_screen].max(initial=0.0) for track in bodies]
    return float(max(pieces)) if pieces else None


def _floor(bodies: Sequence[Track]) -> float | None:
    # A ball cut by a side still shows its lowest point, but its centroid is off.
    depths = [-track.height[track.whole].min() for track in bodies if track.whole.any()]
    return max(0.0, float(max(depths))) if depths else None


def _overlap(bodies: Sequence[Track]) -> float | None:
    depths = []
    for one, two in combinations([track for track in bodies if not track.is_box], 2):
        both = one.whole & two.whole
        distance = np.linalg.norm(one.position - two.position, axis=1)[both]
        depths.extend(one.size + two.size - distance)
    return max(0.0, float(max(depths))) if depths else None


# --- scoring


def path_length(seen: Observation) -> float:
    """Mean over the bodies of the length of the path that each is seen on, in pixels."""
    lengths = [
        np.linalg.norm(np.diff(track.position[track.visible], axis=0), axis=1).sum()
        for track in seen.bodies
    ]
    return float(np.mean(lengths)) if lengths else 0.0


def measure(frames: np.ndarray) -> dict[str, float | None]:
    """The values of all PC checks, in the units of CHECKS; None where one does not apply.

    frames: (F, SIZE, SIZE, 3) uint8 RGB.
    """
    return _measure(observe(frames))


def _measure(seen: Observation) -> dict[str, float | None]:
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


@cache
def packaged_tolerances() -> dict[str, float]:
    """What each PC check allows by default, in the check's unit."""
    text = importlib.resources.files("videorepa.lab").joinpath(TOLERANCES).read_text("utf-8")
    return json.loads(text)["tolerances"]


def score(frames: np.ndarray, caption: str, tolerances: dict[str, float] | None = None) -> Verdict:
    """Judge one clip.

    frames: (F, SIZE, SIZE, 3) uint8 RGB. caption: one of the lab's own, else UserError.
    tolerances: of the PC checks, in their units; those of the package by default.
    """
    request = parse_caption(caption)
    seen = observe(frames)
    limits = packaged_tolerances() if tolerances is None else tolerances
    values: dict[str, float | None] = {
        "objects": _objects(seen, request),
        "event": _event(seen, request),
        "direction": _direction(seen, request),
    } | _measure(seen)
    checks = {}
    for name, value in values.items():
        # What SA measures is a shortfall already; its thresholds are part of the definition.
        limit = 0.0 if CHECKS[name].aspect == "sa" else limits[name]
        number = 0.0 if value is None else float(value)
        checks[name] = Check(number, limit, number <= limit, value is not None)
    passed = {
        aspect: all(c.passed for name, c in checks.items() if CHECKS[name].aspect == aspect)
        for aspect in ("sa", "pc")
    }
    return Verdict(passed["sa"], passed["pc"], checks, path_length(seen))
