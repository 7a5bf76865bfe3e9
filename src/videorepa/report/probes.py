"""Draws what a probe found: a panel for each scenario, with all sources side by side in it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from videorepa.probing.records import Accuracy, Difference, Probe
from videorepa.report.plots import Group, Interval, Plot, draw_columns
from videorepa.system.wording import BEYOND_CHANCE, count, number

EVEN = 50.0
"""Percent; panels show it even where all that is found lies above."""


@dataclass(frozen=True)
class Point:
    """A source's accuracy in all draws of one timestep: their mean, from the lowest to the highest
    end of their exact intervals. right: test clips it is right about, in each draw."""

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
class Part:
    """What is read from features of one kind: one pooling, and one block of each model."""

    title: str
    plots: Sequence[Plot]
    points: Sequence[Point]
    differences: Sequence[Difference]
    says: Sequence[str]


@dataclass(frozen=True)
class Drawn:
    """A probe as the page shows it. draws: how many noises each clip was read with."""

    probe: Probe
    draws: int
    parts: Sequence[Part]


def draw_probe(name: str, probe: Probe, colours: Mapping[str, int]) -> Drawn:
    """The panels of a probe. name starts every id in them, so it has to be unique on a page."""
    draws = len({a.draw for a in probe.accuracies if a.draw is not None})
    # One span, so that panels can be compared by eye.
    ends = [end for a in probe.accuracies for end in (a.low, a.high) if end is not None]
    low, high = min(EVEN, *ends), max(EVEN, *ends)
    span = (10.0 * math.floor(low / 10), 10.0 * math.ceil(high / 10))
    parts = [
        _part(f"{name}-{place}", probe, pool, block, span, colours)
        for place, (pool, block) in enumerate((p, b) for p in probe.pools for b in probe.blocks)
    ]
    return Drawn(probe, draws, parts)


def _part(
    name: str,
    probe: Probe,
    pool: int,
    block: int,
    span: tuple[float, float],
    colours: Mapping[str, int],
) -> Part:
    read = [a for a in probe.accuracies if a.pool == pool and a.block in (block, None)]
    by_scenario: dict[str, list[Accuracy]] = defaultdict(list)
    for accuracy in read:
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
            f"{count(n, 'clip')}, of which {touch} touch. Dotted, chance: always the commoner "
            f"answer, {number(commoner)} %."
        )
        plots.append(
            Plot(f"{scenario} clips" if scenario == "all" else scenario, note, Markup(svg))
        )
    differences = [d for d in probe.differences if d.pool == pool and d.block in (block, None)]
    title = f"Tokens of each step averaged to {pool} × {pool}, block {block}"
    every = [point for of in points.values() for point in of]
    return Part(title, plots, every, differences, _says(differences))


def _points(accuracies: Sequence[Accuracy]) -> list[Point]:
    draws: dict[tuple[str, int | None, int | None], list[Accuracy]] = defaultdict(list)
    for accuracy in accuracies:
        draws[accuracy.source, accuracy.block, accuracy.timestep].append(accuracy)
    return [
        Point(
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


def _says(differences: Sequence[Difference]) -> list[str]:
    """How many of a source's differences are beyond chance, and which way they go."""
    by_source: dict[tuple[str, str], list[Difference]] = defaultdict(list)
    for difference in differences:
        by_source[difference.source, difference.against].append(difference)
    said = []
    for (source, against), of in by_source.items():
        found = [d.difference > 0 for d in of if d.p_holm < BEYOND_CHANCE]
        ways = f" ({sum(found)} above, {len(found) - sum(found)} below)" if found else ""
        said.append(
            f"{source} less {against}: {len(found) or 'none'} of {count(len(of), 'difference')} "
            f"beyond chance{ways}."
        )
    return said
