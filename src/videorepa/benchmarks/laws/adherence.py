"""Semantic adherence: whether a clip shows the objects, event and direction of its caption."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import numpy as np

from videorepa.benchmarks.laws.captions import Request
from videorepa.benchmarks.laws.tracking import NEAR_FLOOR, Observation, Track
from videorepa.world.simulator import FLOOR, SIZE

MOVED = 4.0
"""Pixels after which something has moved, in the sense of a caption."""

TURNS_ABOVE = 4.0
"""Pixels above the floor at which the fastest ball may seem to turn: half of its step per frame,
plus the error of a blurred ball's radius."""

BOUNCED = 3.0
"""Pixels that a ball has to rise again for it to have bounced."""

STOPPED = 0.5
"""Pixels per frame below which something has stopped."""

SIDEWAYS = 1.5
"""Pixels after which something has moved to a side."""


def objects(seen: Observation, request: Request) -> float:
    """The number of named objects that are missing or wrong, plus that of others in the clip."""
    bodies = {track.colour: track for track in seen.bodies}
    named = dict(zip(request.colours, request.shapes, strict=True))
    wrong = len(named.keys() ^ bodies.keys())
    wrong += sum(
        track.is_box != (named[colour] == "box")
        for colour, track in bodies.items()
        if colour in named and track.whole.any()
    )
    # A second body of the same colour counts only if it stays for a while.
    wrong += sum(int((track.components > 1).sum() >= 3) for track in bodies.values())
    return float(wrong + ((request.event == "hide") != (seen.screen is not None)))


def event(seen: Observation, request: Request) -> float:
    """How many pixels of movement the named event lacks; 0 if it happens."""
    tracks = [seen.tracks[colour] for colour in request.colours]
    if not all(track.is_body for track in tracks):
        return float(SIZE)
    return _EVENTS[request.event](tracks, seen, request.sign)


def _shift(track: Track) -> float:
    """How far the body ends to the right of where it started, in pixels."""
    x = track.position[track.visible, 0]
    return float(x[-1] - x[0])


def _down(track: Track) -> tuple[float, float]:
    """How many pixels a fall to the floor lacks, and by how many the body rises after it."""
    height = track.height[track.visible]
    # A ball may touch the floor and leave it again between two frames, so that it seems to turn a
    # little above the floor: by what it covers in half a frame.
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
    """Each body comes up to the next one, which then moves on."""
    worst = 0.0
    for first, second in pairwise(tracks):
        together = first.visible & second.visible
        if not together.any():
            return float(SIZE)
        gap = np.linalg.norm(first.position - second.position, axis=1) - first.size - second.size
        approach = min(MOVED, gap[together][0]) - np.nanmin(gap)
        # Frames are coarse. At 3 px/frame the balls may turn while they are 3 px apart.
        lacking = (MOVED / 2 - approach, np.nanmin(gap) - 4.0, MOVED / 2 - sign * _shift(second))
        worst = max(worst, *lacking)
    return float(worst)


def _topples(tracks: list[Track], seen: Observation, sign: int) -> float:
    """The first body falls from above the second."""
    first, second = (track.position[track.visible, 1] for track in tracks[:2])
    fallen = first[-1] - first[0]
    return float(max(MOVED - (second[0] - first[0]), MOVED - fallen, 0.0))


def _is_caught(tracks: list[Track], seen: Observation, sign: int) -> float:
    """The body falls and ends low between two planks."""
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
    # A ball that always shows more than half of itself has passed in front of the screen.
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


def direction(seen: Observation, request: Request) -> float | None:
    """How much movement to the named side is lacking, in pixels. None if no side is named."""
    if not request.sign:
        return None
    track = seen.tracks[request.colours[0]]
    return max(SIDEWAYS - request.sign * _shift(track), 0.0) if track.is_body else SIDEWAYS
