"""Locates the coloured bodies, the screen and the planks from a clip's pixels alone.

The room is almost gray, so a body is recognised by its hue. Decoded clips are blurred and their
colours are off. So hue decides which body a pixel belongs to. How much of the pixel the body covers
is measured against the body's own strongest colour, not the palette's. The room is what shows where
no body is, and the screen and the planks are recognised in it by their brightness. The camera must
not move.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from videorepa.errors import UserError
from videorepa.world.render import SCREEN
from videorepa.world.simulator import COLOURS, FLOOR, SIZE

NEAR_FLOOR = 1.5
"""Pixels between a body and the floor up to which they count as touching."""

# Two axes that span the colours without brightness. A colour's direction in this plane is its hue.
_HUE_PLANE = np.array([[2, -1, -1], [0, 3**0.5, -(3**0.5)]], np.float32).T / 6**0.5

_PALETTE = np.array(list(COLOURS.values()), np.float32) @ _HUE_PLANE

_STRENGTH = np.linalg.norm(_PALETTE, axis=1)

_LIKENESS = (_PALETTE @ _PALETTE.T) / np.outer(_STRENGTH, _STRENGTH)

_IN_FRAME = np.zeros((3, 3, 3), bool)

_IN_FRAME[1] = True
"""Neighbours within a frame, not across time."""

SOLID = 0.4
"""Share of a palette colour's strength above which a pixel is inside a body."""

FAINT = 0.2
"""Share above which a pixel is in a body's soft rim, which the sub-pixel centroid uses."""

SMALLEST_AREA = 6.0
"""Square pixels of the smallest patch of colour that counts as a body."""

NEIGHBOUR = 0.35
"""Cosine between two colours' hues above which blur can turn one into the other."""

FOREIGN_DIFFERENCE = 0.25
"""Difference from the room, in [0, 1], above which a pixel shows something."""

OBLONG = 1.2
"""Ratio of its long to its short axis above which a body is a box and not a ball."""

LIKE_SCREEN = 0.065
"""Distance from the screen's brightness, in [0, 1], below which a pixel can be the screen's. The
wall is brighter even in shadow, and the planks are darker even where they are blurred."""

NEAR_PLANK = 2
"""Pixels between a body and a plank up to which the plank may carry the body."""


@dataclass(frozen=True)
class Track:
    """The largest patch of one colour in every frame.

    Attributes:
        colour: A name of `world.simulator.COLOURS`.
        visible: (F,) bool, whether the colour is in the frame at all.
        position: (F, 2) float, centroid x and y in pixels; NaN where not visible.
        area: (F,) float, visible square pixels of the patch; 0 where not visible.
        elongation: (F,) float >= 1, ratio of the patch's long to its short axis; NaN where not
            visible.
        stray: (F,) float, square pixels of the colour's second largest patch; 0 without one.
        components: (F,) int, patches of the colour of at least SMALLEST_AREA.
        lowest: (F,) float, y of the patch's lower edge in pixels; NaN where not visible.
        at_edge: (F,) bool, whether the frame's edge may cut the patch.
        at_screen: (F,) bool, whether the screen may hide a part of the patch.
        at_plank: (F,) bool, whether a plank may carry or stop the body.
        mask: (F, SIZE, SIZE) bool, the patch's pixels.
    """

    colour: str
    visible: np.ndarray
    position: np.ndarray
    area: np.ndarray
    elongation: np.ndarray
    stray: np.ndarray
    components: np.ndarray
    lowest: np.ndarray
    at_edge: np.ndarray
    at_screen: np.ndarray
    at_plank: np.ndarray
    mask: np.ndarray

    @property
    def radius(self) -> np.ndarray:
        """(F,) radius in pixels of a disc of the patch's area; 0 where not visible."""
        return np.sqrt(self.area / np.pi)

    @property
    def whole(self) -> np.ndarray:
        """(F,) bool: visible and cut by nothing, so that centroid and size are the body's own."""
        return self.visible & ~self.at_edge & ~self.at_screen

    @property
    def size(self) -> float:
        """The body's radius in pixels: the median over frames that show all of it.

        Without such a frame it is the largest visible radius, or NaN for a body that is never
        visible.
        """
        if self.whole.any():
            return float(np.median(self.radius[self.whole]))
        return float(self.radius.max()) if self.visible.any() else float("nan")

    @property
    def is_body(self) -> bool:
        """Whether there is too much of the colour, for too long, for a discoloured rim or a
        flicker."""
        return bool((self.area >= 3 * SMALLEST_AREA).sum() >= 3)

    @property
    def is_box(self) -> bool:
        """Whether the body is oblong in most of the frames that show all of it."""
        shape = self.elongation[self.whole]
        return bool(len(shape)) and float(np.median(shape)) > OBLONG

    @property
    def height(self) -> np.ndarray:
        """(F,) pixels from the floor up to the body's lowest point; NaN where not visible.

        A ball's lowest point is computed from its centre, which is more precise than its edge.
        """
        return FLOOR - (self.lowest if self.is_box else self.position[:, 1] + self.size)


@dataclass(frozen=True)
class Rectangle:
    """Edges in whole pixels. `right` and `bottom` are the first ones outside."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class Observation:
    """What a clip shows.

    Attributes:
        tracks: One for each of `world.simulator.COLOURS`, even if the colour never occurs.
        screen: Where the gray screen stands, or None.
        planks: (SIZE, SIZE) bool, pixels of the dark rails.
        differs: (F, SIZE, SIZE) bool, pixels that differ from the room.
    """

    tracks: dict[str, Track]
    screen: Rectangle | None
    planks: np.ndarray
    differs: np.ndarray

    @property
    def bodies(self) -> tuple[Track, ...]:
        """The tracks that are bodies."""
        return tuple(track for track in self.tracks.values() if track.is_body)

    def foreign_area(self, tracks: Iterable[Track]) -> np.ndarray:
        """(F,) square pixels of the largest thing that is none of these tracks."""
        own = np.zeros_like(self.differs)
        for track in tracks:
            own |= track.mask
        # The blur around a ball reaches three pixels.
        around = np.asarray(ndimage.binary_dilation(own, _IN_FRAME, iterations=3), bool)
        left = self.differs & ~around
        labels, count = ndimage.label(left, _IN_FRAME)  # pyright: ignore[reportGeneralTypeIssues]
        largest = np.zeros(len(left))
        if count:
            frame, sizes = _frame_and_size(labels, count)
            np.maximum.at(largest, frame, sizes)
        return largest


def observe(frames: np.ndarray) -> Observation:
    """Track every colour through a clip.

    Args:
        frames: (F, SIZE, SIZE, 3) uint8 RGB.

    Raises:
        UserError: The frames have another shape or type.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[1:] != (SIZE, SIZE, 3):
        raise UserError(
            f"The clip has the shape {frames.shape} and the type {frames.dtype}; the lab's have "
            f"(F, {SIZE}, {SIZE}, 3) and uint8. Score only clips of the lab's own models."
        )
    video = frames.astype(np.float32) / 255.0
    along = video @ _HUE_PLANE @ (_PALETTE / _STRENGTH[:, None]).T
    room = _room(video, (along / _STRENGTH).max(-1) > FAINT)
    screen, planks = _find_screen(room), _find_planks(room)
    differs = np.abs(video - room).max(-1) > FOREIGN_DIFFERENCE
    # Thin lines are blurred edges, not things.
    differs = ndimage.binary_opening(differs, np.ones((1, 2, 2), bool))

    tracks = _tracks(along, np.ones(len(COLOURS), bool), screen, planks)
    # Where a body moves fast, hues are uncertain. So track again, with the bodies' colours alone.
    theirs = np.array([t.is_body and not _is_discoloration(t, tracks) for t in tracks.values()])
    if theirs.any():
        tracks = _tracks(along, theirs, screen, planks)
    return Observation(tracks, screen, planks, differs)


def _room(video: np.ndarray, coloured: np.ndarray) -> np.ndarray:
    """(SIZE, SIZE, 3): the median of each pixel over the frames in which no body covers it, or over
    all frames if a body always does."""
    shown = np.where((coloured & ~coloured.all(0))[..., None], np.inf, video)
    middle = np.isfinite(shown[..., :1]).sum(0, keepdims=True) // 2
    return np.take_along_axis(np.sort(shown, axis=0), middle, axis=0)[0]


def _tracks(
    along: np.ndarray, among: np.ndarray, screen: Rectangle | None, planks: np.ndarray
) -> dict[str, Track]:
    """Track some of the colours. The others get empty tracks.

    Args:
        along: (F, SIZE, SIZE, 6), length of every pixel's hue vector along each colour's direction.
        among: (6,) bool, the colours to track.
    """
    nearest = np.where(among, along, -np.inf).argmax(-1)
    rails = np.asarray(
        ndimage.binary_dilation(planks, np.ones((3, 3)), iterations=NEAR_PLANK), bool
    )
    return {
        colour: _track(
            colour,
            np.where((nearest == index) & among[index], along[..., index], 0.0) / _STRENGTH[index],
            screen,
            rails,
        )
        for index, colour in enumerate(COLOURS)
    }


def _is_discoloration(track: Track, tracks: dict[str, Track]) -> bool:
    """Whether a patch is only the blur of a body of a neighbouring colour.

    Such a patch is much smaller than the body, and mostly visible where the body is in the same
    frame or in the frame before or after.
    """
    patch = track.mask.any((1, 2))
    here = list(COLOURS).index(track.colour)
    for other in tracks.values():
        there = list(COLOURS).index(other.colour)
        if other is track or _LIKENESS[here, there] < NEIGHBOUR or not other.is_body:
            continue
        if track.area.sum() > other.area.sum() / 2:
            continue
        around = ndimage.binary_dilation(other.mask, np.ones((3, 3, 3), bool))
        around = np.asarray(ndimage.binary_dilation(around, _IN_FRAME, iterations=2), bool)
        if (track.mask & around).any((1, 2)).sum() > 0.75 * patch.sum():
            return True
    return False


def _grown(box: Rectangle, by: int) -> tuple[slice, slice]:
    return (
        slice(max(box.top - by, 0), max(box.bottom + by, 0)),
        slice(max(box.left - by, 0), max(box.right + by, 0)),
    )


def _frame_and_size(labels: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The frame of every component, and its number of pixels."""
    sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
    frame = [box[0].start for box in ndimage.find_objects(labels)]
    return np.array(frame, int), sizes.astype(float)


def _find_screen(room: np.ndarray) -> Rectangle | None:
    """The largest broad patch of the screen's gray."""
    gray = (np.abs(room.mean(-1) - SCREEN) < LIKE_SCREEN) & (np.ptp(room, axis=-1) < 0.13)
    gray[int(FLOOR) - 1 :] = False
    # A screen is broad; a blurred row above the floor is not.
    gray = ndimage.binary_opening(gray, np.ones((5, 5), bool))
    labels, count = ndimage.label(gray)  # pyright: ignore[reportGeneralTypeIssues]
    if not count:
        return None
    sizes = np.bincount(labels.ravel())[1:]
    rows, columns = ndimage.find_objects(labels)[int(sizes.argmax())]
    if sizes.max() < 64:
        return None
    # The screen stands on the floor.
    bottom = int(FLOOR) if rows.stop >= FLOOR - 3 else rows.stop
    return Rectangle(columns.start, rows.start, columns.stop, bottom)


def _find_planks(room: np.ndarray) -> np.ndarray:
    dark = room.max(-1) < SCREEN - LIKE_SCREEN
    dark[int(FLOOR) :] = False
    return np.asarray(ndimage.binary_opening(dark, np.ones((2, 2), bool)), bool)


def _track(colour: str, cover: np.ndarray, screen: Rectangle | None, rails: np.ndarray) -> Track:
    """Track one colour.

    Args:
        cover: (F, SIZE, SIZE), how much of a pixel has this colour; 0 for other hues.
        rails: (SIZE, SIZE) bool, where a plank is near.
    """
    count_frames = len(cover)
    visible = np.zeros(count_frames, bool)
    position = np.full((count_frames, 2), np.nan)
    area, stray = np.zeros(count_frames), np.zeros(count_frames)
    elongation, lowest = np.full((2, count_frames), np.nan)
    components = np.zeros(count_frames, int)
    mask = np.zeros(cover.shape, bool)

    labels, count = ndimage.label(cover > SOLID, _IN_FRAME)  # pyright: ignore[reportGeneralTypeIssues]
    if count:
        of_frame, sizes = _frame_and_size(labels, count)
        for frame in range(count_frames):
            here = np.nonzero(of_frame == frame)[0]
            here = here[np.argsort(-sizes[here])]
            components[frame] = int((sizes[here] >= SMALLEST_AREA).sum())
            if not components[frame]:
                continue
            stray[frame] = sizes[here[1]] if len(here) > 1 else 0.0
            core = labels[frame] == here[0] + 1
            mask[frame] = core
            visible[frame] = True
            shape = _shape(core, cover[frame])
            position[frame], area[frame], elongation[frame], lowest[frame] = shape

    border = mask.copy()
    border[:, 1:-1, 1:-1] = False
    at_screen = np.zeros(count_frames, bool)
    if screen is not None:
        rows, columns = _grown(screen, 2)
        at_screen = np.asarray(mask[:, rows, columns].any((1, 2)))
    return Track(
        colour,
        visible,
        position,
        area,
        elongation,
        stray,
        components,
        lowest,
        np.asarray(border.any((1, 2))),
        at_screen,
        np.asarray((mask & rails).any((1, 2))),
        mask,
    )


def _shape(core: np.ndarray, cover: np.ndarray) -> tuple[np.ndarray, float, float, float]:
    """Centroid (x, y), area, elongation and lower edge of the patch `core` with its soft rim."""
    reach = np.asarray(ndimage.binary_dilation(core, iterations=2), bool)
    ys, xs = np.nonzero(reach & (cover > FAINT))
    weight = cover[ys, xs]
    # A pale body covers its pixels as fully as a bright one.
    weight = np.minimum(weight / np.percentile(cover[core], 75), 1.0)
    area = float(weight.sum())
    points = np.stack([xs + 0.5, ys + 0.5], 1)
    centre = weight @ points / area
    away = points - centre
    # A pixel is a square of variance 1/12. This keeps a single row from being infinitely long.
    spread = (away * weight[:, None]).T @ away / area + np.eye(2) / 12
    short, long = np.linalg.eigvalsh(spread)
    # A row below the centre counts as much as the fullest of its pixels.
    rows = np.zeros(SIZE)
    np.maximum.at(rows, ys, weight)
    middle = int(centre[1])
    return centre, area, float(np.sqrt(long / short)), middle + float(rows[middle:].sum())
