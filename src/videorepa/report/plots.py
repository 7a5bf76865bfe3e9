"""Draws plots as SVG whose colours come from the page, so that dark mode works.

Every `draw_` function returns an <svg> element and takes a name, with which all ids in the drawing
start. The name has to be unique on a page and made of [a-z0-9_-].
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

COLOURS = 8
"""Number of --series-N colours in the style sheet. Further series reuse them."""

SMOOTHED_SHARE = 0.05
"""Share of the logged steps over which the smoothed line is a running mean."""

SHOWN_SHARE = 0.99
"""Share of the raw values that the y axis spans, so that one spike does not flatten the others."""

POINTS = 800
"""Largest number of points in a raw line. A plot is about half as many pixels wide."""

LONGEST_LABEL = 22

# matplotlib needs real colours. These stand in for the page's and are replaced after drawing.
_INK, _FAINT = "#010203", "#040506"

_WIDTH_INCHES = 5.0

_BAR_INCHES = 0.15

_GAP = 0.9
"""Space between two groups of bars, in bars."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "font.size": 11.5,
    "text.parse_math": False,
    "text.color": _INK,
    "axes.edgecolor": _FAINT,
    "axes.labelcolor": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "grid.color": _FAINT,
    "grid.linewidth": 0.5,
}


@dataclass(frozen=True)
class Plot:
    """A plot with its title and the note below the title."""

    title: str
    note: str
    svg: Markup


@dataclass(frozen=True)
class Line:
    """One run's values of one quantity. `steps` and `values` are (N,) and finite."""

    colour: int
    steps: np.ndarray
    values: np.ndarray
    dashed: bool = False


@dataclass(frozen=True)
class Interval:
    """A value and the interval around it, if there is one."""

    label: str
    colour: int
    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Group:
    """Values that belong together, one for each model."""

    label: str
    bars: Sequence[Interval]


@dataclass(frozen=True)
class Profile:
    """A quantity over the blocks of a model, with its intervals. All are (N,), blocks ascending."""

    colour: int
    blocks: Sequence[int]
    values: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


def smooth(values: np.ndarray) -> np.ndarray:
    """The centred running mean of values (N,). Near the ends the window is cut off."""
    window = np.ones(2 * round(len(values) * SMOOTHED_SHARE / 2) + 1)
    count = np.convolve(np.ones_like(values), window, "same")
    return np.convolve(values, window, "same") / count


def thin(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most about `POINTS` of the points (N,).

    Each stretch keeps its lowest and its highest point, so that no spike is lost.
    """
    if len(values) <= POINTS:
        return steps, values
    kept: set[int] = {0, len(values) - 1}
    for part in np.array_split(np.arange(len(values)), POINTS // 2):
        kept |= {int(part[values[part].argmin()]), int(part[values[part].argmax()])}
    index = sorted(kept)
    return steps[index], values[index]


def _colour(index: int) -> str:
    return f"#0a00{index % COLOURS + 1:02x}"


def _svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an <svg> element without a header, with ids that start with `name`."""
    buffer = io.StringIO()
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with warnings.catch_warnings():
        # The browser draws text with its own fonts, so a glyph that is missing here is no loss.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure.savefig(buffer, format="svg", metadata=metadata, transparent=True)
    _, _, svg = buffer.getvalue().partition("<svg")
    head, _, body = svg.partition(">")
    box = re.search(r'viewBox="[^"]*"', head)
    assert box is not None

    def page_colours(style: re.Match[str]) -> str:
        text = style[0].replace(_INK, "var(--ink)").replace(_FAINT, "var(--line)")
        return re.sub(
            "#0a00([0-9a-f]{2})", lambda index: f"var(--series-{int(index[1], 16)})", text
        )

    body = re.sub(r'style="[^"]*"', page_colours, body)
    body = re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", body)
    return Markup(f'<svg {box[0]} role="img" aria-label="{description}">{body}')


def _axes(name: str, x_label: str, y_label: str, height: float = 3.0) -> tuple[Figure, Axes]:
    """Empty axes with a grid, whose figure has a height in inches."""
    matplotlib.rcParams["svg.hashsalt"] = name
    figure = Figure(figsize=(_WIDTH_INCHES, height), layout="constrained")
    axes = figure.add_subplot(xlabel=x_label, ylabel=y_label, axisbelow=True)
    axes.grid(True)
    return figure, axes


def _row_axes(
    name: str, x_label: str, span: tuple[float, float], height: float
) -> tuple[Figure, Axes]:
    """Axes for rows. Their x axis has the ends `span`, and a line at 0 if it reaches below 0."""
    figure, axes = _axes(name, x_label, "", height)
    if span[0] < 0:
        axes.axvline(0.0, color=_INK, linewidth=1.0)
    axes.set_xlim(*span)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6))
    axes.grid(False, axis="y")
    return figure, axes


def _limits(lines: Sequence[Line], log: bool, levels: Sequence[float]) -> tuple[float, float]:
    raw = np.concatenate([line.values for line in lines])
    tail = (1 - SHOWN_SHARE) / 2
    low, high = np.quantile(raw, [tail, 1 - tail])
    smoothed = np.concatenate([smooth(line.values) for line in lines])
    low, high = min(low, smoothed.min(), *levels), max(high, smoothed.max(), *levels)
    if log:
        return low / 1.2, high * 1.2
    room = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return low - room, high + room


def draw_curve(
    name: str,
    y_label: str,
    lines: Sequence[Line],
    log: bool = False,
    levels: Sequence[float] = (),
) -> Markup:
    """Draw lines over optimiser steps: the raw ones faint, the smoothed ones on top.

    Args:
        log: Whether the y axis is logarithmic, provided that all values are positive.
        levels: Values at which a dotted line is drawn. The y axis spans them too.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(name, "optimiser step", y_label)
        log = log and all((line.values > 0).all() for line in lines)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        for line in lines:
            colour, style = _colour(line.colour), "--" if line.dashed else "-"
            marker = "o" if len(line.values) == 1 else None
            axes.plot(*thin(line.steps, line.values), color=colour, alpha=0.22, linewidth=0.8)
            steps, values = thin(line.steps, smooth(line.values))
            axes.plot(steps, values, color=colour, linewidth=1.8, linestyle=style, marker=marker)
        for level in levels:
            axes.axhline(level, color=_INK, linewidth=1.0, linestyle=":")
        axes.set_ylim(*_limits(lines, log, levels))
        axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return _svg(figure, name, f"{y_label} over optimiser steps")


def draw_intervals(
    name: str, x_label: str, rows: Sequence[Interval], span: tuple[float, float]
) -> Markup:
    """Draw a dot and its interval in each row, the first row on top.

    Args:
        span: Ends of the x axis. If it reaches below 0, a line is drawn at 0.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _row_axes(name, x_label, span, 0.7 + 0.34 * len(rows))
        for place, row in enumerate(rows):
            colour = _colour(row.colour)
            if row.low is not None and row.high is not None:
                axes.plot([row.low, row.high], [place, place], color=colour, linewidth=2.2)
            # A dot at the end of the axis is drawn whole and in front of it.
            dot = {"marker": "o", "markersize": 7, "clip_on": False, "zorder": 3}
            axes.plot([row.value], [place], color=colour, **dot)
        axes.set_yticks(range(len(rows)), [_short(row.label) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        return _svg(figure, name, x_label)


def draw_groups(
    name: str, x_label: str, groups: Sequence[Group], span: tuple[float, float]
) -> Markup:
    """Draw a bar and its interval for every value, one group below the other.

    Args:
        span: Ends of the x axis. Bars start at 0. If it reaches below 0, a line is drawn there.
    """
    with matplotlib.rc_context(_STYLE):
        rows = sum(len(group.bars) + _GAP for group in groups)
        figure, axes = _row_axes(name, x_label, span, 0.7 + _BAR_INCHES * rows)
        place, middles = 0.0, []
        for group in groups:
            middles.append(place + (len(group.bars) - 1) / 2)
            for bar in group.bars:
                colour = _colour(bar.colour)
                axes.barh(place, bar.value, height=0.8, color=colour, alpha=0.35, linewidth=0)
                axes.plot([bar.value] * 2, [place - 0.4, place + 0.4], color=colour, linewidth=2.2)
                if bar.low is not None and bar.high is not None:
                    axes.plot([bar.low, bar.high], [place, place], color=colour, linewidth=1.4)
                place += 1
            place += _GAP
        axes.set_yticks(middles, [_short(group.label) for group in groups])
        axes.set_ylim(place - _GAP - 0.2, -0.8)
        axes.tick_params(axis="y", length=0)
        return _svg(figure, name, f"{x_label} by category")


def draw_columns(
    name: str,
    x_label: str,
    y_label: str,
    columns: Sequence[Group],
    span: tuple[float, float],
    level: float,
) -> Markup:
    """Draw dots with their intervals, those of a column side by side.

    Args:
        span: Ends of the y axis.
        level: Value at which a dotted line is drawn.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(name, x_label, y_label)
        axes.axhline(level, color=_INK, linewidth=1.2, linestyle=":")
        place, middles = 0.0, []
        for column in columns:
            middles.append(place + (len(column.bars) - 1) / 2)
            for bar in column.bars:
                colour = _colour(bar.colour)
                if bar.low is not None and bar.high is not None:
                    axes.plot([place, place], [bar.low, bar.high], color=colour, linewidth=1.8)
                axes.plot([place], [bar.value], color=colour, marker="o", markersize=4.5)
                place += 1
            place += _GAP
        axes.set_xticks(middles, [column.label for column in columns])
        axes.set_xlim(-1, place - _GAP)
        axes.set_ylim(*span)
        axes.grid(False, axis="x")
        return _svg(figure, name, f"{y_label} by {x_label}")


def _short(text: str) -> str:
    return text if len(text) <= LONGEST_LABEL else text[:LONGEST_LABEL] + "…"


def draw_profiles(
    name: str,
    y_label: str,
    profiles: Sequence[Profile],
    levels: Sequence[tuple[float, str]],
    marked: Sequence[int] = (),
) -> Markup:
    """Draw lines over a model's blocks, each within the band of its intervals.

    Args:
        levels: Values that belong to no block, each with matplotlib's name of a line style.
        marked: Blocks to mark.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _axes(name, "block", y_label)
        for block in marked:
            axes.axvline(block, color=_FAINT, linewidth=8)
        for profile in profiles:
            x, colour = profile.blocks, _colour(profile.colour)
            axes.fill_between(x, profile.low, profile.high, color=colour, alpha=0.12, linewidth=0)
            axes.plot(x, profile.values, color=colour, linewidth=1.8, marker="o", markersize=3.5)
        for value, style in levels:
            axes.axhline(value, color=_INK, linewidth=1.2, linestyle=style)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10, integer=True))
        return _svg(figure, name, f"{y_label} over blocks")
