"""Draws what a scan found: a panel for each measure, a line for each noise level."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from videorepa.probing.records import Reading, Scan
from videorepa.report.plots import COLOURS, Plot, Profile, draw_profiles

MEASURES = {
    "relation_error": (
        "Relation error to {}",
        "relation error (0 to 2)",
        "How far apart two tokens' similarities are in block and teacher, over all pairs. Lower is "
        "closer.",
    ),
    "cka": (
        "CKA with {}",
        "linear CKA (0 to 1)",
        "Likeness of all tokens of a clip, less their mean. Higher is closer.",
    ),
    "contact_auc": (
        "Contact, beside {}",
        "ROC AUC (0.5 is chance)",
        "How well a linear probe foretells whether two things will touch. Higher is better.",
    ),
}

SOURCES = {
    "teacher": ("-", "Solid: the teacher"),
    "pixels": ("--", "Dashed: raw pixels"),
    "untrained": (":", "Dotted: the untrained teacher"),
}
"""What is drawn as a level, with its line style and its name in the legend."""


@dataclass(frozen=True)
class Line:
    """A reading, for the page's table of numbers."""

    measure: str
    source: str
    noise: str
    reading: Reading


@dataclass(frozen=True)
class Drawn:
    """A scan as the page shows it. levels: noise levels, each with its colour's number."""

    scan: Scan
    levels: Sequence[tuple[float, int]]
    plots: Sequence[Plot]
    lines: Sequence[Line]


def draw_scan(name: str, scan: Scan) -> Drawn:
    """The panels of a scan. name starts every id in them, so it has to be unique on a page."""
    plots = [
        _plot(f"{name}-{place}-{measure.replace('_', '-')}", scan, teacher, measure)
        for place, teacher in enumerate(scan.teachers)
        for measure in MEASURES
        if any(reading.measure == measure for reading in scan.readings)
    ]
    levels = [(level, place % COLOURS + 1) for place, level in enumerate(scan.noise_levels)]
    return Drawn(scan, levels, plots, [_line(reading) for reading in scan.readings])


def _plot(name: str, scan: Scan, teacher: str, measure: str) -> Plot:
    title, y_label, note = MEASURES[measure]
    of = [r for r in scan.readings if r.measure == measure and r.teacher in (teacher, None)]
    profiles = []
    for colour, level in enumerate(scan.noise_levels):
        points = sorted((r for r in of if r.noise == level), key=lambda r: r.block or 0)
        profiles.append(
            Profile(
                colour,
                [r.block or 0 for r in points],
                [r.value for r in points],
                [r.low for r in points],
                [r.high for r in points],
            )
        )
    straw = {r.source: r.value for r in of if r.block is None}
    found = [(straw[source], *how) for source, how in SOURCES.items() if source in straw]
    legend = ". ".join(f"{said}, {value:.3f}" for value, _, said in found)
    levels = [(value, style) for value, style, _ in found]
    svg = draw_profiles(name, y_label, profiles, levels, scan.aligned_blocks)
    return Plot(title.format(teacher), f"{note} {legend}.", Markup(svg))


def _line(reading: Reading) -> Line:
    source = reading.source if reading.block is None else f"block {reading.block}"
    noise = "none" if reading.noise is None else f"{reading.noise:g}"
    return Line(reading.measure.replace("_", " "), source, noise, reading)
