"""Scores: a benchmark's table, its bars by category, and what may be said of paired differences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from videorepa.artifacts.scores import Difference, Metric, Scores
from videorepa.errors import UserError
from videorepa.evaluation.statistics import holm
from videorepa.report.plots import Group, Interval, draw_groups, draw_intervals
from videorepa.system.wording import BEYOND_CHANCE, label

FEWEST_PROMPTS = 6
"""With fewer a category's difference is not shown: even if all agree, McNemar's p is above 0.06."""

LEAST_REACH = 10.0
"""Points that a plot of differences shows to either side of 0, or more."""


@dataclass(frozen=True)
class Verdict:
    """A paired difference, and what may be said of it.

    category: "" for all clips. p_holm: adjusted for all the tests that stand in the same table.
    """

    model: str
    against: str
    category: str
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
    """One benchmark's scores, by model. metrics, categories: in the order of the page's rows.

    too_few: categories with too few prompts for a difference, and how many they have.
    """

    benchmark: str
    version: str
    about: str | None
    scores: Mapping[str, Scores]
    metrics: Sequence[str]
    categories: Sequence[str]
    plots: Sequence[Markup]
    category_plots: Sequence[Markup]
    verdicts: Sequence[Verdict]
    difference_plots: Sequence[Markup]
    category_verdicts: Sequence[Verdict]
    category_difference_plots: Sequence[Markup]
    too_few: Mapping[str, int]

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

    @property
    def beyond_chance(self) -> list[Verdict]:
        """Differences of categories that are, when all of them are adjusted for."""
        return [
            verdict
            for verdict in self.category_verdicts
            if verdict.p_holm is not None and verdict.p_holm < BEYOND_CHANCE
        ]


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
    claims, too_few = _category_claims(scores)
    category_verdicts = _verdicts(claims)
    return Table(
        benchmark=benchmark,
        version=version,
        about=next((summary.about for summary in summaries if summary.about), None),
        scores=scores,
        metrics=metrics,
        categories=categories,
        plots=_score_plots(name, metrics, scores, colours),
        category_plots=_category_plots(name, metrics, categories, scores, colours),
        verdicts=_verdicts(_claims(scores)),
        difference_plots=_difference_plots(name, metrics, scores, colours),
        category_verdicts=category_verdicts,
        category_difference_plots=_category_difference_plots(name, category_verdicts, colours),
        too_few=too_few,
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
                points.append(_interval(row, colours[model], change))
        if points:
            x_label = f"difference in {label(metric)} (points)"
            svg = draw_intervals(f"{name}-difference-{place}", x_label, points, _span(points))
            plots.append(Markup(svg))
    return plots


def _category_difference_plots(
    name: str, verdicts: Sequence[Verdict], colours: Mapping[str, int]
) -> list[Markup]:
    """One plot per metric counted in percent points: each category's differences, by model."""
    by_metric: dict[str, dict[str, list[Interval]]] = defaultdict(lambda: defaultdict(list))
    for verdict in verdicts:
        if verdict.unit == "points" and math.isfinite(verdict.difference.difference):
            point = _interval(verdict.model, colours[verdict.model], verdict.difference)
            by_metric[verdict.metric][verdict.category].append(point)
    plots = []
    for place, (metric, by_category) in enumerate(by_metric.items()):
        groups = [Group(category, points) for category, points in sorted(by_category.items())]
        span = _span([point for group in groups for point in group.bars])
        x_label = f"difference in {metric} (points)"
        svg = draw_groups(f"{name}-category-difference-{place}", x_label, groups, span)
        plots.append(Markup(svg))
    return plots


def _span(points: Sequence[Interval]) -> tuple[float, float]:
    """As far to either side of 0, and not so little that a difference of nothing fills it."""
    ends = (end for point in points for end in (point.value, point.low, point.high))
    reach = max(LEAST_REACH, *(1.05 * abs(end) for end in ends if end is not None))
    return -reach, reach


def _interval(name: str, colour: int, change: Difference) -> Interval:
    low, high = (change.low, change.high) if change.has_interval else (None, None)
    return Interval(name, colour, change.difference, low, high)


Claim = tuple[str, Scores, str, str, Difference]
"""Model, its scores, category or "" for all clips, metric, and what is found."""


def _claims(scores: Mapping[str, Scores]) -> list[Claim]:
    return [
        (name, item, "", metric, change)
        for name, item in scores.items()
        if item.comparison
        for metric, change in item.comparison.metrics.items()
    ]


def _category_claims(scores: Mapping[str, Scores]) -> tuple[list[Claim], dict[str, int]]:
    """What categories have enough prompts to tell, and of the others how many they have at most."""
    claims: list[Claim] = []
    too_few: dict[str, int] = {}
    for name, item in scores.items():
        for category, metrics in item.comparison.by_scenario.items() if item.comparison else ():
            for metric, change in metrics.items():
                prompts = change.independent
                if prompts is not None and prompts < FEWEST_PROMPTS:
                    too_few[category] = max(prompts, too_few.get(category, 0))
                else:
                    claims.append((name, item, category, metric, change))
    return claims, too_few


def _verdicts(claims: Sequence[Claim]) -> list[Verdict]:
    """They stand in one table, so they are one family."""
    adjusted = iter(holm([change.p for *_, change in claims if change.p is not None]))
    verdicts = []
    for name, item, category, metric, change in claims:
        assert item.comparison is not None
        against = item.comparison.against
        if not math.isfinite(change.difference):
            text = f"no pair of {name} and {against} could be compared."
        elif not change.has_interval:
            how = "differ alike" if change.difference else "are equal"
            text = f"all pairs of {name} and {against} {how}, which gives no interval."
        elif change.low > 0:
            text = f"the interval excludes zero: {name} is above {against}."
        elif change.high < 0:
            text = f"the interval excludes zero: {name} is below {against}."
        else:
            text = f"the interval includes zero: these clips cannot tell {name} from {against}."
        p_holm = None if change.p is None else next(adjusted)
        unit = _unit(item, metric)
        verdicts.append(Verdict(name, against, category, label(metric), change, unit, p_holm, text))
    return verdicts
