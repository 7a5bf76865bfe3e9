"""Prints a probe as plain tables, one for each pool and scenario."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from videorepa.probe import Probe

# What is said and written of it.


def table(found: Probe) -> str:
    """For each pool and scenario: a line per source with its accuracy over timesteps, the mean of
    the draws, and one with what it differs by from the source to compare with. What is given no
    noise stands in the last column."""
    lines = []
    for pool in found.pools:
        for scenario in [*found.scenarios, "all", "mean"]:
            lines += _panel(found, pool, scenario)
    return "\n".join([*lines, *found.notes])


def _panel(found: Probe, pool: int, scenario: str) -> Iterator[str]:
    here = [a for a in found.accuracies if (a.pool, a.scenario) == (pool, scenario)]
    differences = [d for d in found.differences if (d.pool, d.scenario) == (pool, scenario)]
    counted = f": {here[0].n} clips, of which {here[0].touch} touch"
    yield f"{scenario}, {pool}x{pool}{counted if scenario != 'mean' else ' over scenarios'}"
    columns = [*found.timesteps, None]
    yield _line("timestep", ["clean" if column is None else str(column) for column in columns])
    for source, block in dict.fromkeys((a.source, a.block) for a in here):
        name = source if block is None else f"{source}, block {block}"
        mine = [(a.timestep, a.percent) for a in here if (a.source, a.block) == (source, block)]
        yield _line(name, _cells(columns, "{:.1f}", mine))
        apart = [d for d in differences if d.source == source and block in (None, d.block)]
        for other in sorted({d.block or 0 for d in apart}):
            of = [d for d in apart if (d.block or 0) == other]
            name = f"  less {found.against}" + (
                f", block {other}" if block is None and other else ""
            )
            yield _line(name, _cells(columns, "{:+.1f}", [(d.timestep, d.difference) for d in of]))
            yield _line("  p", _cells(columns, "{:.3f}", [(d.timestep, d.p) for d in of]))
    widths = [a.high - a.low for a in here if a.low is not None and a.high is not None]
    if widths:
        yield f"Exact 95 % intervals are up to {max(widths):.1f} points wide."
    yield ""


def _cells(
    columns: Sequence[int | None], form: str, values: Sequence[tuple[int | None, float]]
) -> list[str]:
    """The mean of the values at each timestep."""
    at: dict[int | None, list[float]] = defaultdict(list)
    for timestep, value in values:
        at[timestep].append(value)
    return [form.format(np.mean(at[column])) if column in at else "" for column in columns]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<24}{''.join(f'{cell:>7}' for cell in cells)}".rstrip()
