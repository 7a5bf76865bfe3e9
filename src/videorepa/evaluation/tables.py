"""Prints evaluations as a plain table with intervals."""

from __future__ import annotations

from typing import Any

from videorepa.artifacts.scores import Evaluation


def table(evaluations: dict[str, Evaluation], by_scenario: bool = False) -> str:
    """A plain table: a line per model, with every share's 95 % interval; of a benchmark without
    shares, every mean's.

    by_scenario: and a line for each of the scenarios below it.
    """
    lines = []
    for name, found in evaluations.items():
        summary = found.summary
        what = {"could not be read": "failures", "are missing": "missing"}
        notes = [f"{n} clips {said}" for said, key in what.items() if (n := len(summary[key]))]
        note = f"  ({', '.join(notes)})" if notes else ""
        lines.append(f"{name:10s} n={summary['n']:<4d} {_values(summary['metrics'])}{note}")
        scenarios = summary["by_scenario"] if by_scenario else {}
        lines += [f"  {of:15s} {_values(metrics)}" for of, metrics in scenarios.items()]
        if found.comparison is None:
            continue
        parts = {"": found.comparison["metrics"]}
        if by_scenario:
            parts |= {f"{of} ": m for of, m in found.comparison["by_scenario"].items()}
        shown = _shown(summary["metrics"])
        for of, metrics in parts.items():
            for key, value in metrics.items():
                if key not in shown:
                    continue
                if "p" in value:
                    lines.append(
                        f"{'':10s} {of}{key} {value['difference']:+.1f} points "
                        f"[{value['low']:+.1f}, {value['high']:+.1f}], p = {value['p']:.3f} "
                        f"({value['p_holm']:.3f} as one of a family), "
                        f"against {found.comparison['against']}"
                    )
                else:
                    lines.append(
                        f"{'':10s} {of}{key} {value['difference']:+.4f} "
                        f"[{value['low']:+.4f}, {value['high']:+.4f}], "
                        f"against {found.comparison['against']}"
                    )
    return "\n".join(lines)


def _shown(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The shares, or all of a benchmark that has none."""
    return {key: value for key, value in metrics.items() if "percent" in value} or metrics


def _values(metrics: dict[str, dict[str, Any]]) -> str:
    return "   ".join(
        _value(key, value, "percent", ".1f")
        if "percent" in value
        else _value(key, value, "mean", ".4f")
        for key, value in _shown(metrics).items()
    )


def _value(key: str, value: dict[str, Any], kind: str, digits: str) -> str:
    invalid = f" ({value['invalid']} invalid)" if value.get("invalid") else ""
    # Without a valid row there is no value, and no interval of a mean.
    if value[kind] is None:
        return f"{key} none{invalid}"
    interval = f" [{value['low']:{digits}}, {value['high']:{digits}}]" if "low" in value else ""
    return f"{key} {value[kind]:5{digits}}{interval}{invalid}"
