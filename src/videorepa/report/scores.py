"""Scores: a benchmark's table, its bars by category, and what may be said of paired differences."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from videorepa.errors import UserError
from videorepa.report.curves import Group, Interval, draw_groups, draw_intervals
from videorepa.report.inputs import Difference, Metric, Scores
from videorepa.report.wording import label
from videorepa.statistics import holm


@dataclass(frozen=True)
class Verdict:
    """A paired difference, and what may be said of it.

    p_holm: adjusted for all the tests that stand in the same table.
    """

    model: str
    against: str
    metric: str
    difference: Difference
    unit: str
    p_holm: float | None
    text: str

    @property
    def digits(self) -> int:
        return 1 if self.unit == "points" else 3


@dataclass(frozen=True)
class Table:
    """One benchmark's scores, by model. metrics, categories: in the order of the page's rows."""

    benchmark: str
    version: str
    about: str | None
    scores: Mapping[str, Scores]
    metrics: Sequence[str]
    categories: Sequence[str]
    plots: Sequence[Markup]
    category_plots: Sequence[Markup]
    verdicts: Sequence[Verdict]
    tests: int
    difference_plots: Sequence[Markup]

    @property
    def title(self) -> str:
        return f"{self.benchmark}, version {self.version}"

    @property
    def says(self) -> dict[str, list[str]]:
        """What may be said of the differences, each with the metrics it is said of."""
        said: dict[str, list[str]] = {}
        for verdict in self.verdicts:
            said.setdefault(verdict.text, []).append(verdict.metric)
        return said


def draw_tables(scored: Mapping[str, Sequence[Scores]], colours: Mapping[str, int]) -> list[Table]:
    """A table for each benchmark and version. Raises UserError if a model has two scores for one,
    which a table could not tell apart."""
    grouped: dict[tuple[str, str], dict[str, Scores]] = {}
    for name, evaluations in scored.items():
        for scores in evaluations:
            key = scores.summary.benchmark, scores.summary.version
            models = grouped.setdefault(key, {})
            if name in models:
                raise UserError(
                    f"{name} has two score folders of {key[0]} version {key[1]}: "
                    f"{models[name].folder} and {scores.folder}. Give one, or write two reports."
                )
            models[name] = scores
    return [
        _table(f"table-{place}", *key, models, colours)
        for place, (key, models) in enumerate(grouped.items())
    ]


def _table(
    name: str,
    benchmark: str,
    version: str,
    scores: Mapping[str, Scores],
    colours: Mapping[str, int],
) -> Table:
    summaries = [item.summary for item in scores.values()]
    metrics = list(dict.fromkeys(metric for summary in summaries for metric in summary.metrics))
    categories = sorted({category for summary in summaries for category in summary.by_scenario})
    verdicts = _verdicts(scores)
    return Table(
        benchmark=benchmark,
        version=version,
        about=next((summary.about for summary in summaries if summary.about), None),
        scores=scores,
        metrics=metrics,
        categories=categories,
        plots=_score_plots(name, metrics, scores, colours),
        category_plots=_category_plots(name, metrics, categories, scores, colours),
        verdicts=verdicts,
        tests=sum(verdict.p_holm is not None for verdict in verdicts),
        difference_plots=_difference_plots(name, metrics, scores, colours),
    )


def _intervals(found: Mapping[str, Metric | None], colours: Mapping[str, int]) -> list[Interval]:
    """Of the models whose metric is a percentage."""
    return [
        Interval(name, colours[name], value.percent, value.low, value.high)
        for name, value in found.items()
        if value and value.percent is not None and math.isfinite(value.percent)
    ]


def _score_plots(
    name: str, metrics: Sequence[str], scores: Mapping[str, Scores], colours: Mapping[str, int]
) -> list[Markup]:
    plots = []
    for place, metric in enumerate(metrics):
        found = {model: item.summary.metrics.get(metric) for model, item in scores.items()}
        if points := _intervals(found, colours):
            svg = draw_intervals(
                f"{name}-score-{place}", f"{label(metric)} (%)", points, span=(0.0, 100.0)
            )
            plots.append(Markup(svg))
    return plots


def _category_plots(
    name: str,
    metrics: Sequence[str],
    categories: Sequence[str],
    scores: Mapping[str, Scores],
    colours: Mapping[str, int],
) -> list[Markup]:
    plots = []
    for place, metric in enumerate(metrics):
        groups = []
        for category in categories:
            found = {
                model: item.summary.by_scenario.get(category, {}).get(metric)
                for model, item in scores.items()
            }
            if bars := _intervals(found, colours):
                groups.append(Group(category, bars))
        if groups:
            svg = draw_groups(
                f"{name}-category-{place}", f"{label(metric)} (%)", groups, span=(0.0, 100.0)
            )
            plots.append(Markup(svg))
    return plots


def _unit(scores: Scores, metric: str) -> str:
    value = scores.summary.metrics.get(metric)
    return "points" if value and value.percent is not None else "in its own unit"


def _difference_plots(
    name: str, metrics: Sequence[str], scores: Mapping[str, Scores], colours: Mapping[str, int]
) -> list[Markup]:
    """One plot per metric counted in percent points: the compared models' differences."""
    plots = []
    for place, metric in enumerate(metrics):
        points = []
        for model, item in scores.items():
            change = item.comparison.metrics.get(metric) if item.comparison else None
            if change and item.comparison and _unit(item, metric) == "points":
                row = f"{model} − {item.comparison.against}"
                value = change.difference
                points.append(Interval(row, colours[model], value, change.low, change.high))
        if points:
            x_label = f"difference in {label(metric)} (points)"
            svg = draw_intervals(f"{name}-difference-{place}", x_label, points, zero=True)
            plots.append(Markup(svg))
    return plots


def _verdicts(scores: Mapping[str, Scores]) -> list[Verdict]:
    found = [
        (name, item, metric, change)
        for name, item in scores.items()
        if item.comparison
        for metric, change in item.comparison.metrics.items()
    ]
    adjusted = iter(holm([change.p for *_, change in found if change.p is not None]))
    verdicts = []
    for name, item, metric, change in found:
        assert item.comparison is not None
        against = item.comparison.against
        if not math.isfinite(change.difference):
            text = f"no pair of {name} and {against} could be compared."
        elif change.low > 0:
            text = f"the interval excludes zero: {name} is above {against}."
        elif change.high < 0:
            text = f"the interval excludes zero: {name} is below {against}."
        else:
            text = f"the interval includes zero: these clips cannot tell {name} from {against}."
        p_holm = None if change.p is None else next(adjusted)
        unit = _unit(item, metric)
        verdicts.append(Verdict(name, against, label(metric), change, unit, p_holm, text))
    return verdicts
