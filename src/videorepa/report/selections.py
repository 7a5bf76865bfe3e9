"""Draws what choosing the best of n clips does: a panel for each score, and one for motion."""

from __future__ import annotations

from dataclasses import dataclass

from videorepa.artifacts.selection import BestOfCurve, Selection
from videorepa.report.plots import Group, Interval, Plot, draw_columns
from videorepa.system.wording import label


@dataclass(frozen=True)
class DrawnSelection:
    """One choice as the page shows it."""

    selection: Selection
    plots: list[Plot]


def draw_selection(name: str, selection: Selection, colour: int) -> DrawnSelection:
    """The panels of a choice. Every id in them starts with `name`, unique on the page."""
    plots = [
        _panel(f"{name}-{place}", curve, colour) for place, curve in enumerate(selection.curves)
    ]
    return DrawnSelection(selection, plots)


def _panel(name: str, curve: BestOfCurve, colour: int) -> Plot:
    ends = [end for point in curve.points for end in (point.low, point.high)]
    room = 0.05 * (max(ends) - min(ends)) or 1.0
    columns = [
        Group(str(point.n), [Interval("", colour, point.mean, point.low, point.high)])
        for point in curve.points
    ]
    span = min(ends) - room, max(ends) + room
    words = label(curve.label) + (" (%)" if curve.percent else "")
    svg = draw_columns(name, "n, clips to choose from", words, columns, span, curve.points[0].mean)
    notes = {
        "chosen by": "What clips are chosen by: optimistic.",
        "judged by": "A score that has no part in the choice.",
        "motion": "A still clip can win.",
    }
    return Plot(words, notes[curve.role], svg)
