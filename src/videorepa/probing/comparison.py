"""Accuracies of a probe's readouts, and paired differences between its sources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from videorepa.evaluation.pairs import Pairs
from videorepa.evaluation.statistics import clopper_pearson, holm
from videorepa.probing.physion import Stimulus
from videorepa.probing.records import Accuracy, AccuracyDifference
from videorepa.probing.sources import Condition


class ReadoutKey(NamedTuple):
    """A readout's features: a source's block under a condition, averaged to `pool` x `pool`."""

    source: str
    block: int | None
    condition: Condition
    pool: int


class _DrawnReadouts(NamedTuple):
    """The key of readouts that differ only in the draw of noise."""

    source: str
    block: int | None
    timestep: int | None
    pool: int


@dataclass(frozen=True)
class Decisions:
    """A readout's answers.

    Attributes:
        score: The score of each test clip, by id; above 0 is a yes.
        strengths: The inverse strength of regularisation that was chosen, by scenario.
    """

    score: dict[str, float]
    strengths: dict[str, float]


def prediction_rows(
    key: ReadoutKey, decisions: Decisions, stimuli: Mapping[str, Stimulus]
) -> Iterator[dict[str, Any]]:
    """A row of predictions.csv for each test clip.

    Args:
        stimuli: The clips by id.
    """
    for clip, score in decisions.score.items():
        stimulus = stimuli[clip]
        yield {
            "source": key.source,
            "block": key.block,
            "timestep": key.condition.timestep,
            "draw": key.condition.draw,
            "pool": key.pool,
            "clip": stimulus.stem,
            "scenario": stimulus.scenario,
            "touches": stimulus.touches,
            "score": score,
            "right": (score > 0) == stimulus.touches,
        }


def accuracies(
    key: ReadoutKey, decisions: Decisions, stimuli: Mapping[str, Stimulus]
) -> Iterator[Accuracy]:
    """How often a readout is right: in each scenario, in all clips, in the mean over scenarios."""
    rows = list(prediction_rows(key, decisions, stimuli))
    by_scenario = defaultdict(list)
    for row in rows:
        by_scenario[row["scenario"]].append(row)
    blank = Accuracy(key.source, key.block, *key.condition, key.pool, "", 0.0)
    percents = []
    for scenario, mine in [*sorted(by_scenario.items()), ("all", rows)]:
        right, n = sum(row["right"] for row in mine), len(mine)
        low, high = clopper_pearson(right, n)
        percents.append(100.0 * right / n)
        yield replace(
            blank,
            scenario=scenario,
            percent=percents[-1],
            low=100 * low,
            high=100 * high,
            right=right,
            n=n,
            touch=sum(row["touches"] for row in mine),
            strength=decisions.strengths.get(scenario),
        )
    yield replace(blank, scenario="mean", percent=float(np.mean(percents[:-1])))


def differences(
    decided: Mapping[ReadoutKey, Decisions], stimuli: Mapping[str, Stimulus], against: str
) -> list[AccuracyDifference]:
    """Every source minus the source `against`, at the same block, timestep, draw and pool.

    An encoder, which has no block and sees no noise, is compared at all blocks and timesteps, and
    is the same in all draws.
    """
    rows: dict[_DrawnReadouts, dict[int | None, list[dict[str, Any]]]] = defaultdict(dict)
    for key, decisions in decided.items():
        readouts = _DrawnReadouts(key.source, key.block, key.condition.timestep, key.pool)
        rows[readouts][key.condition.draw] = list(prediction_rows(key, decisions, stimuli))
    unadjusted = [
        difference
        for one, ours in rows.items()
        for other, theirs in rows.items()
        if other.source == against != one.source and _comparable(one, other)
        for difference in _compare(one, ours, other, theirs)
    ]
    families: dict[tuple, list[AccuracyDifference]] = defaultdict(list)
    for difference in unadjusted:
        families[difference.source, difference.block, difference.pool].append(difference)
    return [
        replace(difference, p_holm=p)
        for family in families.values()
        for difference, p in zip(family, holm([each.p for each in family]), strict=True)
    ]


def _comparable(a: _DrawnReadouts, b: _DrawnReadouts) -> bool:
    """Whether two differ only in the source, and in a block or timestep that one does not have."""
    return a.pool == b.pool and all(
        mine == theirs or None in (mine, theirs)
        for mine, theirs in ((a.block, b.block), (a.timestep, b.timestep))
    )


def _compare(
    one: _DrawnReadouts,
    ours: Mapping[int | None, list],
    other: _DrawnReadouts,
    theirs: Mapping[int | None, list],
) -> Iterator[AccuracyDifference]:
    draws = sorted({draw for draw in (*ours, *theirs) if draw is not None}) or [0]

    def clips(side: Mapping[int | None, list], scenario: str) -> list[dict[str, Any]]:
        return [
            row | {"prompt_id": row["clip"], "k": draw}
            for draw in draws
            for row in side[draw if draw in side else None]
            if scenario in ("all", row["scenario"])
        ]

    for scenario in [*sorted({row["scenario"] for rows in ours.values() for row in rows}), "all"]:
        # `Pairs` subtracts A from B, so the other is A.
        both = Pairs.of(clips(theirs, scenario), clips(ours, scenario)).flag("right")
        yield AccuracyDifference(
            source=one.source,
            against=other.source,
            block=one.block or other.block,
            timestep=other.timestep if one.timestep is None else one.timestep,
            pool=one.pool,
            scenario=scenario,
            difference=both["difference"],
            low=both["low"],
            high=both["high"],
            n=both["n"],
            only_source=both["only_b"],
            only_against=both["only_a"],
            p=both["p"],
            p_holm=float("nan"),
        )
