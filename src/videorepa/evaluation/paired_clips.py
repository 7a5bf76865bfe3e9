"""Reads pairs of a real clip and one that breaks a law: from a list, or in LikePhys's layout."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from videorepa.data.manifest import csv_rows
from videorepa.data.video import iterate, read_chosen
from videorepa.errors import ClipError, UserError
from videorepa.settings.sections import ClipSize
from videorepa.system.wording import count

COLUMNS = ("real", "broken", "caption")
"""The columns that a list of pairs must have. It may also have `id`, `law` and `degree`."""

PROMPTS = {
    "ball_drop": "ball dropping and colliding with the ground, in empty background",
    "ball_collision": "two balls colliding with each other",
    "pendulum": "a pendulum swinging",
    "block_slide": "a block sliding on a slope",
    "pyramid": "a cube crash into a pile of spheres",
    "fluid": "a droplet falling",
    "faucet": "fluid flowing from a faucet",
    "river": "fluid flowing in a tank with obstacles",
    "cloth_drape": "a piece of cloth dropping to the obstacle on the ground",
    "flag": "a piece of cloth waving in the wind",
    "shadow": "light source moving around an object showing its shadow",
    "shadow_camera": "camera moving around an object",
}
"""LikePhys's prompts, by the scenario that a folder is named after."""

LEFT_OUT = {
    "shadow_camera": {"shadow_disconnection"},
    "pendulum": {"reverse_gravity", "break_conservation_energy"},
    "river": {"color_change", "teleporting_fluid", "negative_viscosity"},
}
"""Variations that LikePhys does not count, by scenario."""

SQUARE, APART = 8, 8.0
"""Pixels a side of the squares in which first frames are compared, and the difference of a square's
mean, in levels of 255, up to which they are one frame."""


@dataclass(frozen=True)
class Pair:
    """Two clips that differ in one broken law.

    Attributes:
        id: Unique among the pairs.
        group: The name of the real clip. Pairs that have it in common share its noise.
        law: What is broken.
        degree: How much, for the curves; None for pairs without degrees.
        scenario: The part of the data set, which gets a table of its own.
    """

    id: str
    group: str
    law: str
    degree: float | None
    scenario: str
    caption: str
    real: Path
    broken: Path


@dataclass
class PairList:
    """The pairs of a data set.

    Attributes:
        published: Whether it is LikePhys's, which has a metric of its own.
        failures: Why a pair cannot be used, by its id.
        left_out: Pairs of variations that the authors do not count.
    """

    pairs: list[Pair] = field(default_factory=list)
    published: bool = False
    failures: dict[str, str] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def read_pairs(source: Path) -> PairList:
    """Read a .csv list of pairs, or a folder in LikePhys's layout.

    A broken clip belongs to one pair. A real one may belong to several, under one caption.

    Raises:
        UserError: It is neither, or holds no pair.
    """
    found = _published(source) if source.is_dir() else _listed(source)
    _leave_out_clips_in_two_pairs(found)
    if not found.pairs:
        faults = [f" The first fault: {name}: {why}." for name, why in found.failures.items()]
        raise UserError(
            f"{source} holds no pair of clips that can be used; expected a .csv file with the "
            f"columns {', '.join(COLUMNS)}, or LikePhys's folders SCENARIO_videos/subgroup_000 "
            f"with valid_00.mp4.{''.join(faults[:1])}"
        )
    return found


def _listed(path: Path) -> PairList:
    found = PairList()
    for line in csv_rows(path):
        row = {column: str(value) for column, value in line.values.items()}
        if lacking := [name for name in COLUMNS if name not in row]:
            raise UserError(
                f"{path} lacks the column {', '.join(lacking)}; a list of pairs has "
                f"{', '.join(COLUMNS)}, and may have id, law and degree."
            )
        name = row.get("id") or row["broken"] or f"line {line.line}"
        if twice := name in found.failures or any(pair.id == name for pair in found.pairs):
            name = f"{name}, line {line.line}"
        problem = "its id is another pair's" if twice else _no_partner(path.parent, row)
        try:
            degree = float(row["degree"]) if row.get("degree") else None
        except ValueError:
            degree, problem = None, f"its degree is no number: {row['degree']!r}"
        if problem:
            found.failures[name] = problem
            continue
        law = row.get("law") or "broken"
        real, broken = path.parent / row["real"], path.parent / row["broken"]
        found.pairs.append(
            Pair(name, row["real"], law, degree, law, row["caption"] or "", real, broken)
        )
    return found


def _no_partner(folder: Path, row: dict[str, str]) -> str | None:
    for column in ("real", "broken"):
        if not row[column]:
            return f"it has no partner: its {column} clip is not named"
        if not (folder / row[column]).is_file():
            return f"it has no partner: there is no {column} clip {row[column]}"
    return None


def _published(folder: Path) -> PairList:
    found = PairList(published=True)
    for subgroup in sorted(folder.glob("*_videos/subgroup_*")):
        scenario = subgroup.parent.name.removesuffix("_videos")
        group = f"{subgroup.parent.name}/{subgroup.name}"
        real = subgroup / "valid_00.mp4"
        for broken in sorted(set(subgroup.glob("*.mp4")) - {real}):
            variation, name = broken.stem.rpartition("_")[0], f"{group}/{broken.name}"
            if scenario not in PROMPTS:
                found.failures[name] = f"LikePhys has no scenario {scenario}, so it has no prompt"
            elif not real.is_file():
                found.failures[name] = "it has no partner: its subgroup has no valid_00.mp4"
            elif variation in LEFT_OUT.get(scenario, ()):
                found.left_out.append(name)
            else:
                law = f"{scenario}/{variation}"
                pair = Pair(name, group, law, None, scenario, PROMPTS[scenario], real, broken)
                found.pairs.append(pair)
        if real.is_file() and len(list(subgroup.glob("*.mp4"))) == 1:
            found.failures[f"{group}/valid_00.mp4"] = "it has no partner: nothing else is there"
    return found


def _leave_out_clips_in_two_pairs(found: PairList) -> None:
    broken = Counter(pair.broken for pair in found.pairs)
    captions: dict[Path, set[str]] = defaultdict(set)
    for pair in found.pairs:
        captions[pair.real].add(pair.caption)
    for pair in found.pairs:
        if broken[pair.broken] > 1:
            found.failures[pair.id] = f"its broken clip {pair.broken.name} is in two pairs"
        elif pair.broken in captions:
            found.failures[pair.id] = f"{pair.broken.name} is broken here and real in another pair"
        elif len(captions[pair.real]) > 1:
            found.failures[pair.id] = f"its real clip {pair.real.name} has two captions"
    found.pairs = [pair for pair in found.pairs if pair.id not in found.failures]


def read_clip(path: Path, size: ClipSize) -> tuple[np.ndarray, int]:
    """Read a clip as LikePhys does: evenly spaced frames, stretched to the model's size.

    Returns:
        (size.frames, size.height, size.width, 3) uint8, and the number of frames in the file.

    Raises:
        ClipError: It cannot be read, or has fewer frames than the model takes.
    """
    total = sum(1 for _ in iterate(path))
    if total < size.frames:
        raise ClipError(f"{path.name} has {total} frames; the model takes {size.frames}")
    numbers = np.linspace(0, total - 1, size.frames).round().astype(int).tolist()
    return read_chosen(path, numbers, size.height, size.width), total


def read_group(
    pairs: Sequence[Pair], size: ClipSize, failures: dict[str, str], shows_first: bool = False
) -> tuple[list[Pair], list[np.ndarray]]:
    """Read the real clip that pairs have in common, and their broken clips.

    Args:
        failures: Gets the reason why a pair cannot be used, by its id.
        shows_first: Whether the model is shown the real clip's first frame for both. A pair whose
            broken clip begins with another frame cannot be used then: the model would be asked
            which clip goes with the frame, and not which one obeys the law.

    Returns:
        The pairs that can be used, and the frames of the real clip and of each one's broken clip.
    """
    try:
        real, length = read_clip(pairs[0].real, size)
    except ClipError as error:
        failures |= {pair.id: f"its real clip cannot be used: {error}" for pair in pairs}
        return [], []
    readable, frames = [], [real]
    for pair in pairs:
        try:
            broken, its_length = read_clip(pair.broken, size)
            if its_length != length:
                raise ClipError(
                    f"the broken clip has {its_length} frames and the real one {length}"
                )
            if shows_first and begin_apart(real[0], broken[0]):
                raise ClipError(
                    "the broken clip begins with another frame than the real one, whose first "
                    "frame the model is shown"
                )
        except ClipError as error:
            failures[pair.id] = str(error)
            continue
        readable.append(pair)
        frames.append(broken)
    return readable, frames


def begin_apart(one: UInt8[np.ndarray, "h w 3"], other: UInt8[np.ndarray, "h w 3"]) -> bool:
    """Whether two frames differ by more than two encodings of one frame do: by more than `APART`
    levels of 255 in the mean of a square of `SQUARE` pixels a side."""
    squares = one.astype(np.float32) - other
    for axis, side in enumerate(squares.shape[:2]):
        squares = np.add.reduceat(squares, range(0, side, SQUARE), axis) / SQUARE
    return bool(np.abs(squares).max() > APART)


def groups(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """The pairs of each real clip."""
    by_real: dict[Path, list[Pair]] = defaultdict(list)
    for pair in pairs:
        by_real[pair.real].append(pair)
    return list(by_real.values())


def left_out_note(found: PairList) -> str:
    """Say how many pairs are not counted, or "" if none."""
    if not found.left_out:
        return ""
    return (
        f"{count(len(found.left_out), 'pair')} of variations that LikePhys leaves out are not "
        f"scored, the first is {found.left_out[0]}."
    )
