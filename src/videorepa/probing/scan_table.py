"""Words a scan as a plain table and in sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from videorepa.probing.records import Reading, Scan

NAMES = {"relation_error": "relation error", "cka": "CKA"}
STRAW_MEN = {"pixels": "raw pixels", "untrained": "untrained"}


def sentences(teachers: Sequence[str], readings: Sequence[Reading]) -> list[str]:
    """What was measured. Which block to align does not follow from it."""
    lines = []
    for teacher in teachers:
        by_block: dict[int, list[float]] = defaultdict(list)
        straw = {}
        for reading in readings:
            if reading.teacher != teacher or reading.measure != "relation_error":
                continue
            if reading.block is None:
                straw[reading.source] = reading.value
            else:
                by_block[reading.block].append(reading.value)
        mean = {block: float(np.mean(values)) for block, values in by_block.items()}
        far, near = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
        lines.append(
            f"Over all noise levels, block {far} is farthest from {teacher} (relation error "
            f"{mean[far]:.3f}) and block {near} nearest ({mean[near]:.3f}); raw pixels are at "
            f"{straw['pixels']:.3f}, the untrained teacher at {straw['untrained']:.3f}."
        )
    lines.append("Which block gains most from being aligned is not measured by this.")
    return lines


def table(scan: Scan) -> str:
    """A plain table for each teacher, then notes and sentences. Intervals are in scan.csv.

    A line for each block has the noise levels of a measure side by side. The straw men, which see
    no noise, follow.
    """
    value = {
        (r.measure, r.teacher, r.source, r.block, r.noise): f"{r.value:.3f}" for r in scan.readings
    }
    width = max(6 * len(scan.noise_levels), *map(len, NAMES.values()))
    levels = "".join(f"{level:<6g}" for level in scan.noise_levels)
    lines = []
    for teacher in scan.teachers:
        lines.append(f"{teacher}:")
        lines.append(_line("", list(NAMES.values()), width))
        lines.append(_line("noise", [levels] * len(NAMES), width))
        for block in scan.blocks:
            cells = [
                "".join(
                    f"{value[measure, teacher, 'block', block, level]:<6}"
                    for level in scan.noise_levels
                )
                for measure in NAMES
            ]
            lines.append(_line(f"block {block}", cells, width))
        for source, name in STRAW_MEN.items():
            cells = [value[measure, teacher, source, None, None] for measure in NAMES]
            lines.append(_line(name, cells, width))
        lines.append("")
    return "\n".join([*lines, *scan.notes, *scan.says])


def _line(name: str, cells: Sequence[str], width: int) -> str:
    return f"{name:<12}{'  '.join(f'{cell:<{width}}' for cell in cells)}".rstrip()
