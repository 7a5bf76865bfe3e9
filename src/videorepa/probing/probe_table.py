"""Writes a probe as plain tables, one for each pool and scenario."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np

from videorepa.probing.records import AccuracyDifference, Probe


def table(probe: Probe) -> str:
    """A plain table for each pool and scenario, then remarks.

    Each source has a line with its accuracy at each timestep, as the mean of the draws. The line
    below has its difference from the source `probe.against`. The last column is for the clean clip.
    """
    lines = []
    for pool in probe.pools:
        for scenario in [*probe.scenarios, "all", "mean"]:
            lines += _panel(probe, pool, scenario)
    return "\n".join([*lines, *probe.remarks])


def _panel(probe: Probe, pool: int, scenario: str) -> Iterator[str]:
    here = [a for a in probe.accuracies if (a.pool, a.scenario) == (pool, scenario)]
    differences = [d for d in probe.differences if (d.pool, d.scenario) == (pool, scenario)]
    counted = f": {here[0].n} clips, of which {here[0].touch} touch"
    yield f"{scenario}, {pool}x{pool}{counted if scenario != 'mean' else ' over scenarios'}"
    columns = [*probe.timesteps, None]
    yield _line("timestep", ["clean" if column is None else str(column) for column in columns])
    for source, block in dict.fromkeys((a.source, a.block) for a in here):
        name = source if block is None else f"{source}, block {block}"
        mine = [(a.timestep, a.percent) for a in here if (a.source, a.block) == (source, block)]
        yield _line(name, _cells(columns, "{:.1f}", mine))
        by_block: dict[int, list[AccuracyDifference]] = defaultdict(list)
        for difference in differences:
            if difference.source == source and block in (None, difference.block):
                by_block[difference.block or 0].append(difference)
        for other, of in sorted(by_block.items()):
            suffix = f", block {other}" if block is None and other else ""
            cells = _cells(columns, "{:+.1f}", [(d.timestep, d.difference) for d in of])
            yield _line(f"  minus {probe.against}{suffix}", cells)
            yield _line("  p", _cells(columns, "{:.3f}", [(d.timestep, d.p) for d in of]))
    widths = [a.high - a.low for a in here if a.low is not None and a.high is not None]
    if widths:
        yield f"Exact 95 % intervals are up to {max(widths):.1f} points wide."
    yield ""


def _cells(
    columns: Sequence[int | None], form: str, values: Sequence[tuple[int | None, float]]
) -> list[str]:
    """The mean of the values at each timestep, or nothing where there are none."""
    by_timestep: dict[int | None, list[float]] = defaultdict(list)
    for timestep, value in values:
        by_timestep[timestep].append(value)
    return [
        form.format(np.mean(by_timestep[column])) if column in by_timestep else ""
        for column in columns
    ]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<24}{''.join(f'{cell:>7}' for cell in cells)}".rstrip()
