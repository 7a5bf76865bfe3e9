"""Writes scores as a plain table with intervals."""

from __future__ import annotations

from collections.abc import Mapping

from videorepa.artifacts.scores import Comparison, Metric, MetricDifference, Scores, Summary
from videorepa.artifacts.selection import Selection
from videorepa.system.wording import count


def table(scores: Mapping[str, Scores], by_scenario: bool = False) -> str:
    """A plain table with 95 % intervals: a line per model, and one per paired difference.

    It has all shares and the means that are a benchmark's headline, or all means if there is
    neither.

    Args:
        scores: Scores by the model's name.
        by_scenario: Whether to add a line per scenario.
    """
    lines = []
    for name, item in scores.items():
        summary, comparison = item.summary, item.comparison
        notes = notes_on_clips(summary)
        note = f"  ({', '.join(notes)})" if notes else ""
        lines.append(f"{name:10s} n={summary.n:<4d} {_values(summary.metrics)}{note}")
        if summary.says:
            lines.append(f"{'':10s} {' '.join(summary.says)}")
        if by_scenario:
            for scenario, metrics in summary.by_scenario.items():
                lines.append(f"  {scenario:15s} {_values(metrics)}")
        if comparison is None:
            continue
        parts = {"": comparison.metrics}
        if by_scenario:
            parts |= {f"{scenario} ": each for scenario, each in comparison.by_scenario.items()}
        shown = _shown(summary.metrics)
        lines += [
            f"{'':10s} {part}{key} {_difference(value, shown[key])}, against {comparison.against}"
            for part, differences in parts.items()
            for key, value in differences.items()
            if key in shown
        ]
        if notes := left_out(comparison):
            lines.append(f"{'':10s} left out of the comparison: {', '.join(notes)}")
    return "\n".join(lines)


def notes_on_clips(summary: Summary) -> list[str]:
    """What one has to know of the clips that the scores are of, and of those that they lack."""
    problems = {
        "could not be scored": summary.failures,
        "missing": summary.missing,
        "left over and not counted": summary.left_over,
    }
    fewer = [m.prompts for m in summary.metrics.values() if m.prompts and m.prompts < summary.n]
    notes = [f"of {count(max(fewer), 'different prompt')}"] if fewer else []
    return notes + [
        f"{count(len(clips), 'clip')} {what}" for what, clips in problems.items() if clips
    ]


def left_out(comparison: Comparison) -> list[str]:
    """Which clips a comparison is not of."""
    other, apart = comparison.against, comparison.unpaired
    lost = len(comparison.failures)
    notes = [f"{count(apart, 'clip')} of the two without a partner"] if apart else []
    return notes + ([f"{count(lost, 'clip')} of {other} could not be scored"] if lost else [])


def _shown(metrics: Mapping[str, Metric]) -> Mapping[str, Metric]:
    """The shares and headlines, or all metrics if there is neither."""
    shown = {key: each for key, each in metrics.items() if each.is_share or each.headline}
    return shown or metrics


def _values(metrics: Mapping[str, Metric]) -> str:
    return "   ".join(_value(key, metric) for key, metric in _shown(metrics).items())


def _value(key: str, metric: Metric) -> str:
    value, digits = (metric.percent, ".1f") if metric.is_share else (metric.mean, ".4f")
    invalid = f" ({metric.invalid} invalid)" if metric.invalid else ""
    # Without a valid row there is no value, and no interval of a mean.
    if value is None:
        return f"{key} none{invalid}"
    interval = "" if metric.low is None else f" [{metric.low:{digits}}, {metric.high:{digits}}]"
    return f"{key} {value:5{digits}}{interval}{invalid}"


def _difference(value: MetricDifference, metric: Metric) -> str:
    unit, digits = (" points", "+.1f") if metric.is_share else ("", "+.4f")
    interval = f"[{value.low:{digits}}, {value.high:{digits}}]"
    test = "" if value.p is None else f", p = {value.p:.3f} ({value.p_holm:.3f} as one of a family)"
    return f"{value.difference:{digits}}{unit} {interval}{test}"


def best_of_table(selection: Selection) -> str:
    """The curves of a choice as plain text, a line for each n, and what one has to know of them."""
    by, most = selection.chosen_by, selection.most
    lines = [
        f"{selection.source}: the best of each prompt's clips by {by} ({by.better} is better); "
        f"{len(selection.chosen)} chosen of {len(selection.clips)}",
        f"expected of the best of n clips, over {count(selection.prompts, 'prompt')} of "
        f"{count(selection.captions, 'caption')} with {most} clips or more:",
    ]
    for curve in selection.curves:
        role = "" if curve.role == "motion" else f", {curve.role}"
        lines.append(f"{curve.label}{' in %' if curve.percent else ''}{role}")
        digits = ".1f" if curve.percent else ".4f"
        for point in curve.points:
            value = f"{point.mean:{digits}} [{point.low:{digits}}, {point.high:{digits}}]"
            ends = f"[{point.change_low:+{digits}}, {point.change_high:+{digits}}]"
            change = f"   {point.change:+{digits}} {ends} against n=1" if point.n > 1 else ""
            lines.append(f"  n={point.n:<3d} {value}{change}")
    return "\n".join([*lines, *selection.notes])
