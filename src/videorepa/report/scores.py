"""Draws scores: a table per benchmark, bars by category, and verdicts on paired differences."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from videorepa.artifacts.scores import Metric, MetricDifference, Scores, Summary
from videorepa.errors import UserError
from videorepa.evaluation.statistics import holm
from videorepa.report.plots import Group, Interval, draw_groups, draw_intervals
from videorepa.system.fingerprint import json_digest
from videorepa.system.wording import BEYOND_CHANCE, label

FEWEST_PROMPTS = 6
"""Smallest number of prompts for which a category's difference is shown. With fewer, McNemar's p is
above 0.06 even if all of them agree."""

PERCENT = (0.0, 100.0)

LEAST_REACH = 10.0
"""Percentage points to either side of 0 that every plot of differences shows."""


@dataclass(frozen=True)
class DifferenceVerdict:
    """A paired difference and the verdict on it.

    Attributes:
        category: The category whose clips are compared; "" for all clips.
        unit: "points" for a difference of shares.
        p_holm: p-value adjusted for all tests in the same table.
        text: The verdict, as the end of a sentence.
    """

    model: str
    against: str
    category: str
    metric: str
    difference: MetricDifference
    unit: str
    p_holm: float | None
    text: str

    @property
    def digits(self) -> int:
        return 1 if self.unit == "points" else 3


@dataclass(frozen=True)
class BenchmarkTable:
    """One benchmark's scores by model, with its plots and verdicts.

    Attributes:
        asked: What tells it from the page's other tables of the benchmark and version: settings
            and judges, each with its value. Empty where it is the only one.
        about: What the metrics are, if the benchmark explains them.
        notes: What else to know of the models' scores.
        metrics: Names of the metrics, in the order of the page's columns.
        categories: Names of the categories, in the order of the page's rows.
        too_few: Number of prompts of each category that has too few for a difference.
    """

    benchmark: str
    version: str
    asked: Mapping[str, Any]
    about: str | None
    notes: Sequence[str]
    scores: Mapping[str, Scores]
    metrics: Sequence[str]
    categories: Sequence[str]
    plots: Sequence[Markup]
    category_plots: Sequence[Markup]
    verdicts: Sequence[DifferenceVerdict]
    difference_plots: Sequence[Markup]
    category_verdicts: Sequence[DifferenceVerdict]
    category_difference_plots: Sequence[Markup]
    too_few: Mapping[str, int]

    @property
    def title(self) -> str:
        asked = (f"{name}: {value}" for name, value in self.asked.items())
        return ", ".join([self.benchmark, f"version {self.version}", *asked])

    @property
    def says(self) -> dict[str, list[str]]:
        """The metrics of each verdict."""
        metrics: dict[str, list[str]] = defaultdict(list)
        for verdict in self.verdicts:
            metrics[verdict.text].append(verdict.metric)
        return metrics

    @property
    def beyond_chance(self) -> list[DifferenceVerdict]:
        """The differences of categories that are beyond chance after adjusting for all of them."""
        return [
            verdict
            for verdict in self.category_verdicts
            if verdict.p_holm is not None and verdict.p_holm < BEYOND_CHANCE
        ]


def draw_tables(
    scored: Mapping[str, Sequence[Scores]], colours: Mapping[str, int]
) -> list[BenchmarkTable]:
    """A table for each benchmark, version and what was asked.

    Raises:
        UserError: A model has two scores for one table.
    """
    grouped: dict[tuple[str, str, str], dict[str, Scores]] = defaultdict(dict)
    for name, evaluations in scored.items():
        for scores in evaluations:
            summary = scores.summary
            key = summary.benchmark, summary.version, json_digest(summary.asked)
            models = grouped[key]
            if name in models:
                raise UserError(
                    f"{name} has two score folders of {key[0]} version {key[1]}: "
                    f"{models[name].folder} and {scores.folder}. Name one, or write two reports."
                )
            models[name] = scores
    summaries = [next(iter(models.values())).summary for models in grouped.values()]
    return [
        _table(f"table-{place}", _apart(summary, summaries), models, colours)
        for place, (summary, models) in enumerate(zip(summaries, grouped.values(), strict=True))
    ]


def _apart(summary: Summary, summaries: Sequence[Summary]) -> dict[str, Any]:
    """What tells scores from others of their benchmark and version."""
    alike = (summary.benchmark, summary.version)
    others = [each for each in summaries if (each.benchmark, each.version) == alike]
    if len(others) == 1:
        return {}
    if summary.asked is None:
        return {"settings": "not recorded"}
    asked = [other.asked_by_name for other in others]
    return {
        name: value
        for name, value in summary.asked_by_name.items()
        if any(other.get(name) != value for other in asked)
    }


def _table(
    name: str, asked: Mapping[str, Any], scores: Mapping[str, Scores], colours: Mapping[str, int]
) -> BenchmarkTable:
    summaries = [item.summary for item in scores.values()]
    metrics = list(dict.fromkeys(metric for summary in summaries for metric in summary.metrics))
    categories = sorted({category for summary in summaries for category in summary.by_scenario})
    claims, too_few = _category_claims(scores)
    category_verdicts = _verdicts(claims)
    return BenchmarkTable(
        benchmark=summaries[0].benchmark,
        version=summaries[0].version,
        asked=asked,
        about=next((summary.about for summary in summaries if summary.about), None),
        notes=list(dict.fromkeys(note for summary in summaries for note in summary.notes)),
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


def _intervals(metrics: Mapping[str, Metric | None], colours: Mapping[str, int]) -> list[Interval]:
    """The intervals of those models whose metric is a percentage."""
    return [
        Interval(name, colours[name], value.percent, value.low, value.high)
        for name, value in metrics.items()
        if value and value.percent is not None and math.isfinite(value.percent)
    ]


def _score_plots(
    name: str, metrics: Sequence[str], scores: Mapping[str, Scores], colours: Mapping[str, int]
) -> list[Markup]:
    plots = []
    for place, metric in enumerate(metrics):
        by_model = {model: item.summary.metrics.get(metric) for model, item in scores.items()}
        if points := _intervals(by_model, colours):
            x_label = f"{label(metric)} (%)"
            plots.append(draw_intervals(f"{name}-score-{place}", x_label, points, PERCENT))
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
            by_model = {
                model: item.summary.by_scenario.get(category, {}).get(metric)
                for model, item in scores.items()
            }
            if bars := _intervals(by_model, colours):
                groups.append(Group(category, bars))
        if groups:
            x_label = f"{label(metric)} (%)"
            plots.append(draw_groups(f"{name}-category-{place}", x_label, groups, PERCENT))
    return plots


def _unit(scores: Scores, metric: str) -> str:
    value = scores.summary.metrics.get(metric)
    return "points" if value and value.percent is not None else "in its own unit"


def _difference_plots(
    name: str, metrics: Sequence[str], scores: Mapping[str, Scores], colours: Mapping[str, int]
) -> list[Markup]:
    """A plot for each metric in percent: the compared models' differences."""
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
            plots.append(
                draw_intervals(f"{name}-difference-{place}", x_label, points, _span(points))
            )
    return plots


def _category_difference_plots(
    name: str, verdicts: Sequence[DifferenceVerdict], colours: Mapping[str, int]
) -> list[Markup]:
    """A plot for each metric in percent: each category's differences, by model."""
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
        plots.append(draw_groups(f"{name}-category-difference-{place}", x_label, groups, span))
    return plots


def _span(points: Sequence[Interval]) -> tuple[float, float]:
    """A span that holds all points, is symmetric around 0 and is not too narrow."""
    ends = (end for point in points for end in (point.value, point.low, point.high))
    reach = max(LEAST_REACH, *(1.05 * abs(end) for end in ends if end is not None))
    return -reach, reach


def _interval(name: str, colour: int, change: MetricDifference) -> Interval:
    low, high = (change.low, change.high) if change.has_interval else (None, None)
    return Interval(name, colour, change.difference, low, high)


Claim = tuple[str, Scores, str, str, MetricDifference]
"""A model, its scores, the category or "" for all clips, the metric, and the difference."""


def _claims(scores: Mapping[str, Scores]) -> list[Claim]:
    return [
        (name, item, "", metric, change)
        for name, item in scores.items()
        if item.comparison
        for metric, change in item.comparison.metrics.items()
    ]


def _category_claims(scores: Mapping[str, Scores]) -> tuple[list[Claim], dict[str, int]]:
    """The claims about categories with enough prompts, and how many prompts the others have."""
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


def _verdicts(claims: Sequence[Claim]) -> list[DifferenceVerdict]:
    """The verdicts on claims that stand in one table, and so are one family of tests."""
    adjusted = iter(holm([change.p for *_, change in claims if change.p is not None]))
    verdicts = []
    for name, item, category, metric, change in claims:
        assert item.comparison is not None
        against = item.comparison.against
        if not math.isfinite(change.difference):
            text = f"no pair of {name} and {against} could be compared."
        elif not change.has_interval:
            how = "differ equally" if change.difference else "are equal"
            text = f"all pairs of {name} and {against} {how}, so there is no interval."
        elif change.low > 0:
            text = f"the interval excludes zero: {name} is above {against}."
        elif change.high < 0:
            text = f"the interval excludes zero: {name} is below {against}."
        else:
            text = f"the interval includes zero: these clips cannot tell {name} from {against}."
        p_holm = None if change.p is None else next(adjusted)
        unit = _unit(item, metric)
        verdicts.append(
            DifferenceVerdict(name, against, category, label(metric), change, unit, p_holm, text)
        )
    return verdicts
