"""Writes a scan as a plain table and in sentences."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from videorepa.probing.records import Measurement, Scan

NAMES = {
    "relation_error": "relation error",
    "relation_correlation": "relation correlation",
    "clip_correlation": "clip correlation",
    "cka": "CKA",
}
STRAW_MEN = {"pixels": "raw pixels", "untrained": "untrained"}


FAR_MEAN, FAR_SPREAD = 0.1, 1.5
"""Two sides' relations are unlike in mean or in spread beyond such a difference or ratio. In the
lab the teachers within both gained by TRD without a projector, and none beyond
(docs/evidence.md)."""


def sentences(teachers: Sequence[str], measurements: Sequence[Measurement]) -> list[str]:
    """Say which blocks are nearest to and farthest from each teacher, and how relations spread.

    This does not tell which block to align.
    """
    lines = []
    for teacher in teachers:
        of_teacher = [each for each in measurements if each.teacher == teacher]
        others = {
            (each.measure, each.source): each.value for each in of_teacher if each.block is None
        }
        error, mean, spread = (
            _by_block(of_teacher, f"relation_{name}") for name in ("error", "mean", "spread")
        )
        far, near = max(error, key=error.__getitem__), min(error, key=error.__getitem__)
        pixels, untrained = (others["relation_error", name] for name in STRAW_MEN)
        lines.append(
            f"Over all noise levels, block {far} is farthest from {teacher} (relation error "
            f"{error[far]:.3f}) and block {near} nearest ({error[near]:.3f}); raw pixels are at "
            f"{pixels:.3f}, the untrained teacher at {untrained:.3f}."
        )
        lines.append(_of_clips(teacher, of_teacher, others))
        lines.append(_of_spread(teacher, mean, spread, others))
    lines.append("A scan does not measure which block gains most from being aligned.")
    return lines


def _by_block(measurements: Sequence[Measurement], measure: str) -> dict[int, float]:
    """The means of a measure over noise levels, by block."""
    by_block: dict[int, list[float]] = defaultdict(list)
    for each in measurements:
        if each.block is not None and each.measure == measure:
            by_block[each.block].append(each.value)
    return {block: float(np.mean(values)) for block, values in by_block.items()}


def _of_clips(
    teacher: str, measurements: Sequence[Measurement], others: dict[tuple[str, str], float]
) -> str:
    """Say how much the teacher tells of a clip, and where the blocks have most of it."""
    theirs = others["clip_correlation", "teacher"]
    blocks = [m for m in measurements if m.measure == "clip_correlation" and m.block is not None]
    best = max(blocks, key=lambda each: each.value)
    untrained = others["clip_correlation", "untrained"]
    return (
        f"Relations of {teacher} in two clips correlate by {1 - theirs:.2f}; the rest, "
        f"{theirs:.2f}, is what they tell of a clip. Most of it is in block {best.block} at noise "
        f"{best.noise:g}, {best.value:.2f}; the untrained teacher has {untrained:.2f}."
    )


def _of_spread(
    teacher: str,
    mean: dict[int, float],
    spread: dict[int, float],
    others: dict[tuple[str, str], float],
) -> str:
    """Say what TRD would ask of the blocks' own tokens, beside how they go with the teacher's."""
    theirs = others["relation_mean", "teacher"], others["relation_spread", "teacher"]
    unlike = [
        block
        for block in mean
        if abs(mean[block] - theirs[0]) > FAR_MEAN
        or not 1 / FAR_SPREAD <= spread[block] / max(theirs[1], 1e-9) <= FAR_SPREAD
    ]
    told = (
        f"Relations of {teacher} have a mean of {theirs[0]:.2f} and a spread of {theirs[1]:.2f}, "
        f"those of the blocks means from {min(mean.values()):.2f} to {max(mean.values()):.2f} and "
        f"spreads from {min(spread.values()):.2f} to {max(spread.values()):.2f}."
    )
    if not unlike:
        return told
    listed = f"block{'s' * (len(unlike) > 1)} {', '.join(map(str, unlike))}"
    blocks = "every block" if len(unlike) == len(mean) else listed
    return (
        f"{told} TRD without a projector would bring {blocks} to the teacher's mean and spread; "
        "the loss `relation_correlation` leaves both free."
    )


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
