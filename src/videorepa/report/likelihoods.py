"""Draws what models find likelier: panels by law, over degrees and over noise levels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from videorepa.artifacts.scores import Row, Scores
from videorepa.evaluation.likelihood import preference
from videorepa.report.plots import Group, Interval, Plot, draw_columns
from videorepa.system.wording import count

EVEN = 50.0

ALL = "all laws"

SPAN = (-4.0, 104.0)
"""Percent, with room for the whole dots of 0 and 100."""


@dataclass(frozen=True)
class Preference:
    """How often a model finds the real clip likelier.

    Attributes:
        law: What is broken; `ALL` for all pairs.
        degree: How much; None for all degrees.
        noise: The noise level; None for the mean over all levels.
        metric: The share in percent with its 95 % interval, n and invalid, the number of ties.
    """

    law: str
    degree: float | None
    noise: str | None
    model: str
    metric: Mapping[str, Any]


@dataclass(frozen=True)
class DrawnLikelihood:
    """One measurement as the page shows it."""

    models: Sequence[str]
    plots: Sequence[Plot]
    lines: Sequence[Preference]


def preferences(scored: Mapping[str, Scores]) -> list[Preference]:
    """How often each model prefers the real clip, by law, degree and noise level."""
    levels = next(iter(scored.values())).summary.model_dump()["noise_levels"]
    laws = sorted({row["law"] for scores in scored.values() for row in scores.rows})
    found = []
    for law in (ALL, *laws):
        of_law = {
            model: [row for row in scores.rows if law in (ALL, row["law"])]
            for model, scores in scored.items()
        }
        degrees = sorted({row["degree"] for rows in of_law.values() for row in rows} - {None})
        for degree in (*(degrees if law != ALL else ()), None):
            for noise in (*levels, None):
                for model, rows in of_law.items():
                    some = [row for row in rows if degree in (None, row["degree"])]
                    found.append(_preference(law, degree, noise, model, some))
    return found


def _preference(
    law: str, degree: float | None, noise: str | None, model: str, rows: Sequence[Row]
) -> Preference:
    key = "likelier" if noise is None else f"likelier at {noise}"
    return Preference(law, degree, noise, model, preference(rows, key))


def draw_likelihood(
    name: str, scored: Mapping[str, Scores], colours: Mapping[str, int]
) -> DrawnLikelihood:
    """The panels of a measurement. Every id in them starts with `name`, unique on the page."""
    lines = preferences(scored)
    plots = []
    for law in dict.fromkeys(line.law for line in lines):
        of_law = [line for line in lines if line.law == law]
        by_degree = [line for line in of_law if line.degree is not None and line.noise is None]
        by_noise = [line for line in of_law if line.degree is None]
        if by_degree:
            note = f"{_pairs(by_degree)} at each degree, over all noise levels."
            columns = _columns([(f"{line.degree:g}", line) for line in by_degree], colours)
            svg = _drawn(f"{name}-{len(plots)}", "degree", columns)
            plots.append(Plot(f"{law}, by degree", note, svg))
        columns = _columns([(line.noise or "all", line) for line in by_noise], colours)
        svg = _drawn(f"{name}-{len(plots)}", "noise level", columns)
        plots.append(Plot(f"{law}, by noise level", f"{_pairs(by_noise)} of all degrees.", svg))
    return DrawnLikelihood(list(scored), plots, lines)


def _pairs(lines: Sequence[Preference]) -> str:
    return count(max(line.metric["n"] + line.metric["invalid"] for line in lines), "pair")


def _columns(lines: Sequence[tuple[str, Preference]], colours: Mapping[str, int]) -> list[Group]:
    groups: dict[str, list[Interval]] = {}
    for label, line in lines:
        bars, metric = groups.setdefault(label, []), line.metric
        if metric["percent"] is not None:
            ends = metric["low"], metric["high"]
            bars.append(Interval(line.model, colours[line.model], metric["percent"], *ends))
    return [Group(label, bars) for label, bars in groups.items() if bars]


def _drawn(name: str, x_label: str, columns: Sequence[Group]) -> Any:
    return draw_columns(name, x_label, "real clip likelier (%)", columns, SPAN, EVEN)
