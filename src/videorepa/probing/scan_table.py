"""Writes a scan as a plain table and in sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from videorepa.probing.records import Measurement, Scan

NAMES = {"relation_error": "relation error", "cka": "CKA"}
STRAW_MEN = {"pixels": "raw pixels", "untrained": "untrained"}


def sentences(teachers: Sequence[str], measurements: Sequence[Measurement]) -> list[str]:
    """Say which blocks are nearest to and farthest from each teacher.

    This does not tell which block to align.
    """
    lines = []
    for teacher in teachers:
        by_block: dict[int, list[float]] = defaultdict(list)
        straw_men = {}
        for each in measurements:
            if each.teacher != teacher or each.measure != "relation_error":
                continue
            if each.block is None:
                straw_men[each.source] = each.value
            else:
                by_block[each.block].append(each.value)
        mean = {block: float(np.mean(values)) for block, values in by_block.items()}
        far, near = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
        lines.append(
            f"Over all noise levels, block {far} is farthest from {teacher} (relation error "
            f"{mean[far]:.3f}) and block {near} nearest ({mean[near]:.3f}); raw pixels are at "
            f"{straw_men['pixels']:.3f}, the untrained teacher at {straw_men['untrained']:.3f}."
        )
    lines.append("A scan does not measure which block gains most from being aligned.")
    return lines


def table(scan: Scan) -> str:
    """A plain table for each teacher, then notes and sentences. Intervals are in scan.csv.

    Each block has a line with the noise levels of each measure side by side. Below the blocks are
    the straw men, which see no noise.
    """
    value = {
        (m.measure, m.teacher, m.source, m.block, m.noise): f"{m.value:.3f}"
        for m in scan.measurements
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
