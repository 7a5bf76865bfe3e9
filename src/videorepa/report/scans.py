"""Draws a scan: a panel for each measure, with a line for each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from videorepa.probing.records import Reading, Scan
from videorepa.report.plots import COLOURS, Plot, Profile, draw_profiles

MEASURES = {
    "relation_error": (
        "Relation error to {}",
        "relation error (0 to 2)",
        "Mean absolute difference, over all pairs of tokens, between their similarity in the block "
        "and in the teacher. Lower is closer.",
    ),
    "cka": (
        "CKA with {}",
        "linear CKA (0 to 1)",
        "Likeness of all tokens of a clip, minus their mean. Higher is closer.",
    ),
}

STRAW_MEN = {
    "pixels": ("--", "Dashed: raw pixels"),
    "untrained": (":", "Dotted: the untrained teacher"),
}
"""Line style and name in the legend of each source that is drawn as a horizontal line."""


@dataclass(frozen=True)
class ReadingRow:
    """A reading in the page's table of numbers."""

    measure: str
    source: str
    noise: str
    reading: Reading


@dataclass(frozen=True)
class DrawnScan:
    """A scan as the page shows it.

    Attributes:
        levels: Noise levels, each with the number of its colour.
    """

    scan: Scan
    levels: Sequence[tuple[float, int]]
    plots: Sequence[Plot]
    lines: Sequence[ReadingRow]


def draw_scan(name: str, scan: Scan) -> DrawnScan:
    """The panels of a scan. Every id in them starts with `name`, which is unique on the page."""
    plots = [
        _plot(f"{name}-{place}-{measure.replace('_', '-')}", scan, teacher, measure)
        for place, teacher in enumerate(scan.teachers)
        for measure in MEASURES
    ]
    levels = [(level, place % COLOURS + 1) for place, level in enumerate(scan.noise_levels)]
    return DrawnScan(scan, levels, plots, [_row(reading) for reading in scan.readings])


def _plot(name: str, scan: Scan, teacher: str, measure: str) -> Plot:
    title, y_label, note = MEASURES[measure]
    readings = [r for r in scan.readings if (r.measure, r.teacher) == (measure, teacher)]
    profiles = []
    for colour, level in enumerate(scan.noise_levels):
        points = sorted((r for r in readings if r.noise == level), key=lambda r: r.block or 0)
        profiles.append(
            Profile(
                colour,
                [r.block or 0 for r in points],
                [r.value for r in points],
                [r.low for r in points],
                [r.high for r in points],
            )
        )
    straw = {r.source: r.value for r in readings if r.block is None}
    legend = ". ".join(f"{label}, {straw[source]:.3f}" for source, (_, label) in STRAW_MEN.items())
    levels = [(straw[source], style) for source, (style, _) in STRAW_MEN.items()]
    svg = draw_profiles(name, y_label, profiles, levels, scan.aligned_blocks)
    return Plot(title.format(teacher), f"{note} {legend}.", svg)


def _row(reading: Reading) -> ReadingRow:
    source = reading.source if reading.block is None else f"block {reading.block}"
    noise = "none" if reading.noise is None else f"{reading.noise:g}"
    return ReadingRow(reading.measure.replace("_", " "), source, noise, reading)
