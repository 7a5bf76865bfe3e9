"""Draws a probe: a panel for each scenario, with all sources side by side in it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from videorepa.probing.records import Accuracy, AccuracyDifference, Probe
from videorepa.report.plots import Group, Interval, Plot, draw_columns
from videorepa.system.wording import BEYOND_CHANCE, count, number

EVEN = 50.0
"""Percent. Every panel shows it, even if all accuracies are above."""


@dataclass(frozen=True)
class AccuracyPoint:
    """A source's accuracy over the draws of one timestep.

    Attributes:
        percent: The mean of the draws.
        low: The lowest end of their exact intervals, in percent.
        high: The highest end of those intervals.
        right: In each draw, the number of test clips that the source is right about.
        n: Number of test clips.
    """

    scenario: str
    source: str
    block: int | None
    timestep: int | None
    percent: float
    low: float | None
    high: float | None
    right: Sequence[int]
    n: int | None


@dataclass(frozen=True)
class ReadoutPanels:
    """The readouts from features of one kind: one pooling, and one block of each model."""

    title: str
    plots: Sequence[Plot]
    points: Sequence[AccuracyPoint]
    differences: Sequence[AccuracyDifference]
    says: Sequence[str]


@dataclass(frozen=True)
class DrawnProbe:
    """A probe as the page shows it.

    Attributes:
        draws: Number of draws of noise that a model was tested with.
    """

    probe: Probe
    draws: int
    parts: Sequence[ReadoutPanels]


def draw_probe(name: str, probe: Probe, colours: Mapping[str, int]) -> DrawnProbe:
    """The panels of a probe. Every id in them starts with `name`, which is unique on the page."""
    draws = len({a.draw for a in probe.accuracies if a.draw is not None})
    # One span, so that panels can be compared by eye.
    ends = [end for a in probe.accuracies for end in (a.low, a.high) if end is not None]
    low, high = min(EVEN, *ends), max(EVEN, *ends)
    span = (10.0 * math.floor(low / 10), 10.0 * math.ceil(high / 10))
    parts = [
        _part(f"{name}-{place}", probe, pool, block, span, colours)
        for place, (pool, block) in enumerate((p, b) for p in probe.pools for b in probe.blocks)
    ]
    return DrawnProbe(probe, draws, parts)


def _part(
    name: str,
    probe: Probe,
    pool: int,
    block: int,
    span: tuple[float, float],
    colours: Mapping[str, int],
) -> ReadoutPanels:
    by_scenario: dict[str, list[Accuracy]] = defaultdict(list)
    for accuracy in probe.accuracies:
        if accuracy.pool == pool and accuracy.block in (block, None):
            by_scenario[accuracy.scenario].append(accuracy)
    points = {
        scenario: _points(by_scenario[scenario]) for scenario in (*probe.scenarios, "all", "mean")
    }
    plots = []
    for place, scenario in enumerate(("all", *probe.scenarios)):
        first = by_scenario[scenario][0]
        n, touch = first.n or 0, first.touch or 0
        commoner = 100.0 * max(touch, n - touch) / n
        columns = [
            Group(
                "clean" if timestep is None else str(timestep),
                [
                    Interval(p.source, colours[p.source], p.percent, p.low, p.high)
                    for p in points[scenario]
                    if p.timestep == timestep
                ],
            )
            for timestep in (*probe.timesteps, None)
        ]
        svg = draw_columns(
            f"{name}-{place}",
            "timestep of the noise",
            "accuracy (%)",
            [column for column in columns if column.bars],
            span,
            commoner,
        )
        note = (
            f"{count(n, 'clip')}, {touch} of them with contact. Dotted: the accuracy of always "
            f"giving the commoner answer, {number(commoner)} %."
        )
        plots.append(Plot(f"{scenario} clips" if scenario == "all" else scenario, note, svg))
    differences = [d for d in probe.differences if d.pool == pool and d.block in (block, None)]
    title = f"Tokens of each step averaged to {pool} × {pool}, block {block}"
    every = [point for of in points.values() for point in of]
    return ReadoutPanels(title, plots, every, differences, _says(differences))


def _points(accuracies: Sequence[Accuracy]) -> list[AccuracyPoint]:
    draws: dict[tuple[str, int | None, int | None], list[Accuracy]] = defaultdict(list)
    for accuracy in accuracies:
        draws[accuracy.source, accuracy.block, accuracy.timestep].append(accuracy)
    return [
        AccuracyPoint(
            of[0].scenario,
            *place,
            percent=sum(a.percent for a in of) / len(of),
            low=min((a.low for a in of if a.low is not None), default=None),
            high=max((a.high for a in of if a.high is not None), default=None),
            right=[a.right for a in of if a.right is not None],
            n=of[0].n,
        )
        for place, of in draws.items()
    ]


def _says(differences: Sequence[AccuracyDifference]) -> list[str]:
    """How many of a source's differences are beyond chance, and which way they go."""
    by_source: dict[tuple[str, str], list[AccuracyDifference]] = defaultdict(list)
    for difference in differences:
        by_source[difference.source, difference.against].append(difference)
    sentences = []
    for (source, against), of in by_source.items():
        beyond = [d.difference > 0 for d in of if d.p_holm < BEYOND_CHANCE]
        above = sum(beyond)
        ways = f" ({above} above, {len(beyond) - above} below)" if beyond else ""
        sentences.append(
            f"{source} minus {against}: {len(beyond) or 'none'} of {count(len(of), 'difference')} "
            f"beyond chance{ways}."
        )
    return sentences
