"""Draws a scan: a panel for each measure, with a line for each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from videorepa.probing.records import Measurement, Scan
from videorepa.report.plots import COLOURS, Plot, Profile, draw_profiles

MEASURES = {
    "relation_error": (
        "Relation error to {}",
        "relation error (0 to 2)",
        "Mean absolute difference, over all pairs of tokens, between their similarity in the block "
        "and in the teacher. Lower is closer.",
    ),
    "relation_correlation": (
        "Relation correlation with {}",
        "relation correlation (-1 to 1)",
        "How the similarities of pairs of tokens go with the teacher's, whatever their mean and "
        "spread. Higher is closer.",
    ),
    "clip_correlation": (
        "About the clip, as {}",
        "clip correlation (-2 to 2)",
        "How much higher the relation correlation is than with the teacher's relations of another "
        "clip. 0 says nothing about the clip. Higher is closer.",
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
class MeasurementRow:
    """A measurement in the page's table of numbers."""

    measure: str
    source: str
    noise: str
    measurement: Measurement


@dataclass(frozen=True)
class DrawnScan:
    """A scan as the page shows it.

    Attributes:
        levels: Noise levels, each with the number of its colour.
    """

    scan: Scan
    levels: Sequence[tuple[float, int]]
    plots: Sequence[Plot]
    lines: Sequence[MeasurementRow]


def draw_scan(name: str, scan: Scan) -> DrawnScan:
    """The panels of a scan. Every id in them starts with `name`, which is unique on the page."""
    plots = [
        _plot(f"{name}-{place}-{measure.replace('_', '-')}", scan, teacher, measure)
        for place, teacher in enumerate(scan.teachers)
        for measure in MEASURES
        if any(each.measure == measure for each in scan.measurements)  # Earlier scans have fewer.
    ]
    levels = [(level, place % COLOURS + 1) for place, level in enumerate(scan.noise_levels)]
    return DrawnScan(scan, levels, plots, [_row(each) for each in scan.measurements])


def _plot(name: str, scan: Scan, teacher: str, measure: str) -> Plot:
    title, y_label, note = MEASURES[measure]
    measured = [m for m in scan.measurements if (m.measure, m.teacher) == (measure, teacher)]
    profiles = []
    for colour, level in enumerate(scan.noise_levels):
        points = sorted((m for m in measured if m.noise == level), key=lambda m: m.block or 0)
        profiles.append(
            Profile(
                colour,
                [m.block or 0 for m in points],
                [m.value for m in points],
                [m.low for m in points],
                [m.high for m in points],
            )
        )
    straw_men = {m.source: m.value for m in measured if m.block is None}
    legend = ". ".join(
        f"{label}, {straw_men[source]:.3f}" for source, (_, label) in STRAW_MEN.items()
    )
    if "teacher" in straw_men:
        legend += f". The teacher itself: {straw_men['teacher']:.3f}"
    levels = [(straw_men[source], style) for source, (style, _) in STRAW_MEN.items()]
    svg = draw_profiles(name, y_label, profiles, levels, scan.aligned_blocks)
    return Plot(title.format(teacher), f"{note} {legend}.", svg)


def _row(measurement: Measurement) -> MeasurementRow:
    source = measurement.source if measurement.block is None else f"block {measurement.block}"
    noise = "none" if measurement.noise is None else f"{measurement.noise:g}"
    return MeasurementRow(measurement.measure.replace("_", " "), source, noise, measurement)
