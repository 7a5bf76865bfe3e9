"""Prints a scan as a plain table, and says in sentences what was measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from videorepa.probing.records import Reading

if TYPE_CHECKING:
    from videorepa.scan import Scan

NAMES = {"relation_error": "relation error", "cka": "CKA", "contact_auc": "contact AUC"}


# What is said and written of it.


def sentences(teachers: Sequence[str], readings: Sequence[Reading]) -> list[str]:
    """What was measured, in sentences; which block to align does not follow from it."""
    said = []
    for teacher in teachers:
        errors: dict[int, list[float]] = {}
        straw = {}
        for reading in readings:
            if reading.teacher != teacher or reading.measure != "relation_error":
                continue
            if reading.block is None:
                straw[reading.source] = reading.value
            else:
                errors.setdefault(reading.block, []).append(reading.value)
        mean = {block: float(np.mean(values)) for block, values in errors.items()}
        far, near = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
        said.append(
            f"Over all noise levels, block {far} is farthest from {teacher} (relation error "
            f"{mean[far]:.3f}) and block {near} nearest ({mean[near]:.3f}); raw pixels are at "
            f"{straw['pixels']:.3f}, the untrained teacher at {straw['untrained']:.3f}."
        )
    contact = [reading for reading in readings if reading.measure == "contact_auc"]
    in_blocks = [reading for reading in contact if reading.source == "block"]
    if in_blocks:
        best = max(in_blocks, key=lambda reading: reading.value)
        others = [
            f"{_name(reading)} {_with_interval(reading)}"
            for reading in contact
            if reading.source != "block"
        ]
        said.append(
            f"Contact is read best from block {best.block} at noise {best.noise:g}, with an AUC of "
            f"{_with_interval(best)}, the highest of {len(in_blocks)} readings; "
            f"{', '.join(others)}; chance is 0.5."
        )
    said.append("Which block gains most from being aligned is not measured by this.")
    return said


def _name(reading: Reading) -> str:
    """Of a source that is not a block."""
    teacher = reading.teacher
    names = {"pixels": f"raw pixels on {teacher}'s grid", "untrained": f"{teacher} untrained"}
    return names.get(reading.source, str(teacher))


def _with_interval(reading: Reading) -> str:
    return f"{reading.value:.3f} [{reading.low:.3f}, {reading.high:.3f}]"


def table(found: Scan) -> str:
    """A plain table for each teacher: a line per block, the noise levels of a measure side by side;
    then the straw men, which see no noise. Intervals are in scan.csv."""
    value = {
        (r.measure, r.teacher, r.source, r.block, r.noise): f"{r.value:.3f}" for r in found.readings
    }
    measures = [m for m in NAMES if any(r.measure == m for r in found.readings)]
    room = max(6 * len(found.noise_levels), *(len(NAMES[m]) for m in measures))
    lines = []
    for teacher in found.teachers:
        lines.append(f"{teacher}:")
        lines.append(_line("", [NAMES[measure] for measure in measures], room))
        levels = "".join(f"{level:<6g}" for level in found.noise_levels)
        lines.append(_line("noise", [levels for _ in measures], room))
        for block in found.blocks:
            cells = []
            for measure in measures:
                of = None if measure == "contact_auc" else teacher
                keys = ((measure, of, "block", block, level) for level in found.noise_levels)
                cells.append("".join(f"{value[key]:<6}" for key in keys))
            lines.append(_line(f"block {block}", cells, room))
        for source, name in (
            ("pixels", "raw pixels"),
            ("untrained", "untrained"),
            ("teacher", "teacher"),
        ):
            cells = [value.get((m, teacher, source, None, None), "") for m in measures]
            if any(cells):
                lines.append(_line(name, cells, room))
        lines.append("")
    return "\n".join([*lines, *found.notes, *found.says])


def _line(name: str, cells: Sequence[str], room: int) -> str:
    return f"{name:<12}{'  '.join(f'{cell:<{room}}' for cell in cells)}".rstrip()
