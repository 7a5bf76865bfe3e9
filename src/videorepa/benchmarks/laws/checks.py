"""Measures whether a clip shows what its caption says, and whether it obeys the lab's laws.

Semantic adherence (SA) is about the caption. Physical commonsense (PC) is about the clip alone: it
never reads the caption, so a clip of the wrong ball that moves correctly is physical. Every check
compares one value, for which larger is worse, with one tolerance. SA's thresholds belong to the
definitions in `adherence`. PC's tolerances are what real clips need after the autoencoder;
`lab.calibration` sets them.

These checks cannot detect some faults. A roll has no direction in time, so a reversed one is
physical (but fails SA's `direction`). Light, texture, and the shapes of the screen and the planks
are not judged.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np

from videorepa.artifacts.scores import PASSED
from videorepa.benchmarks.laws.adherence import direction, event, objects
from videorepa.benchmarks.laws.captions import parse_caption
from videorepa.benchmarks.laws.physics import deviations, path_length
from videorepa.benchmarks.laws.tracking import observe
from videorepa.system.fingerprint import json_digest

TOLERANCES = "tolerances.json"

FLAGS = ("sa", "pc", "joint")
"""A clip's verdicts in its row."""


@dataclass(frozen=True)
class Definition:
    """What a check measures.

    Attributes:
        unit: Unit of its value.
        meaning: What the value is.
        resolution: The smallest tolerance allowed, in the same unit, however well real clips do.
    """

    aspect: Literal["sa", "pc"]
    unit: str
    meaning: str
    resolution: float = 0.0


CHECKS: dict[str, Definition] = {
    "objects": Definition(
        "sa", "count", "named objects that are missing, and others that are too many"
    ),
    "event": Definition("sa", "px", "movement that the named event lacks"),
    "direction": Definition("sa", "px", "movement to the named side that is lacking"),
    "presence": Definition("pc", "px", "movement that is lacking for the laws to be tested"),
    "gravity": Definition(
        "pc", "px/frame^2", "difference between the acceleration of free flight and g", 0.05
    ),
    "arc": Definition(
        "pc", "px", "distance of free flight from a parabola of acceleration g", 0.25
    ),
    "energy": Definition(
        "pc", "px of height", "growth of kinetic plus potential energy, over weight", 0.25
    ),
    "permanence": Definition(
        "pc", "frames", "frames in which a body is missing, neither hidden nor out of frame"
    ),
    "extras": Definition(
        "pc", "px^2", "area of the largest thing that is neither a body nor the room", 6.0
    ),
    "size": Definition("pc", "fraction", "change of a body's radius", 0.05),
    "shape": Definition("pc", "fraction", "change of the ratio of a body's axes", 0.05),
    "one_piece": Definition(
        "pc", "px^2", "area of the largest piece of a body's colour away from the body", 6.0
    ),
    "floor": Definition("pc", "px", "how deep a body is in the floor", 0.25),
    "momentum": Definition("pc", "px/frame", "change of horizontal velocity without a cause", 0.25),
    "continuity": Definition(
        "pc", "px", "how far a step is outside the range of the steps around it", 0.25
    ),
    "coasting": Definition(
        "pc", "px", "distance of an untouched rolling ball from uniform motion", 0.25
    ),
    "exchange": Definition(
        "pc", "px/frame", "change of the balls' common velocity by collisions", 0.25
    ),
    "overlap": Definition("pc", "px", "how deep two balls are in each other", 0.25),
}


@dataclass(frozen=True)
class Check:
    """One measurement, whose unit and meaning are in CHECKS.

    Attributes:
        applies: Whether the clip can be tested. If not, the value is 0 and the check passes.
    """

    value: float
    tolerance: float
    passed: bool
    applies: bool


@dataclass(frozen=True)
class ClipVerdict:
    """How a clip is judged.

    Attributes:
        sa: Whether all checks of semantic adherence pass.
        pc: Whether all checks of physical commonsense pass.
        motion: See `physics.path_length`.
    """

    sa: bool
    pc: bool
    checks: dict[str, Check]
    motion: float

    def row(self) -> dict[str, float | bool]:
        """The columns of a clip's row.

        Returns:
            sa, pc and joint, which is both; motion; and for every check that applies CHECK_passed
            and CHECK_value, in the unit that `CHECKS` names.
        """
        flags = zip(FLAGS, (self.sa, self.pc, self.sa and self.pc), strict=True)
        row: dict[str, float | bool] = {**dict(flags), "motion": self.motion}
        for name, check in self.checks.items():
            if check.applies:
                row[f"{name}{PASSED}"] = check.passed
                row[f"{name}_value"] = check.value
        return row


@cache
def packaged_tolerances() -> dict[str, float]:
    """The tolerance of each PC check that the package ships, in the check's unit."""
    return json.loads(Path(__file__).with_name(TOLERANCES).read_text("utf-8"))["tolerances"]


def with_tolerances(version: str) -> str:
    """The version of a benchmark that has the package's tolerances.

    Others give the same clip other verdicts, so they make another version.
    """
    return f"{version}-{json_digest(packaged_tolerances())[:8]}"


def score(
    frames: np.ndarray, caption: str, tolerances: dict[str, float] | None = None
) -> ClipVerdict:
    """Judge one clip.

    Args:
        frames: (F, SIZE, SIZE, 3) uint8 RGB.
        caption: One of the lab's own.
        tolerances: The PC checks' tolerances, in their units. By default the package's.

    Raises:
        UserError: The clip has another shape, or the caption is not one of the lab's.
    """
    request = parse_caption(caption)
    seen = observe(frames)
    limits = packaged_tolerances() if tolerances is None else tolerances
    values: dict[str, float | None] = {
        "objects": objects(seen, request),
        "event": event(seen, request),
        "direction": direction(seen, request),
    } | deviations(seen)
    checks = {}
    for name, value in values.items():
        # SA's values are shortfalls: its thresholds are subtracted already.
        limit = 0.0 if CHECKS[name].aspect == "sa" else limits[name]
        number = 0.0 if value is None else float(value)
        checks[name] = Check(number, limit, number <= limit, value is not None)
    passed = {
        aspect: all(c.passed for name, c in checks.items() if CHECKS[name].aspect == aspect)
        for aspect in ("sa", "pc")
    }
    return ClipVerdict(passed["sa"], passed["pc"], checks, path_length(seen))
