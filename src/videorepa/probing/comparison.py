"""Accuracies of a probe's readouts, and paired differences between its sources."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from videorepa.evaluation.pairs import Pairs
from videorepa.evaluation.statistics import clopper_pearson, holm
from videorepa.probing.physion import Stimulus
from videorepa.probing.records import Accuracy, Difference
from videorepa.probing.sources import Condition

# Readouts.


class ReadoutKey(NamedTuple):
    source: str
    block: int | None
    condition: Condition
    pool: int


@dataclass(frozen=True)
class Decisions:
    """score: of each test clip by id, above 0 for a yes. strengths: by scenario."""

    score: dict[str, float]
    strengths: dict[str, float]


def prediction_rows(
    key: ReadoutKey, found: Decisions, of: Mapping[str, Stimulus]
) -> Iterator[dict[str, Any]]:
    """A row for each test clip, as predictions.csv has it."""
    for name, score in found.score.items():
        yield {
            "source": key.source,
            "block": key.block,
            "timestep": key.condition.timestep,
            "draw": key.condition.draw,
            "pool": key.pool,
            "clip": of[name].stem,
            "scenario": of[name].scenario,
            "touches": of[name].touches,
            "score": score,
            "right": (score > 0) == of[name].touches,
        }


def accuracies(key: ReadoutKey, found: Decisions, of: Mapping[str, Stimulus]) -> Iterator[Accuracy]:
    rows = list(prediction_rows(key, found, of))
    by_scenario = defaultdict(list)
    for row in rows:
        by_scenario[row["scenario"]].append(row)
    where = Accuracy(
        key.source, key.block, key.condition.timestep, key.condition.draw, key.pool, "", 0.0
    )
    percents = []
    for scenario, mine in [*sorted(by_scenario.items()), ("all", rows)]:
        right, n = sum(row["right"] for row in mine), len(mine)
        low, high = clopper_pearson(right, n)
        percents.append(100.0 * right / n)
        yield replace(
            where,
            scenario=scenario,
            percent=percents[-1],
            low=100 * low,
            high=100 * high,
            right=right,
            n=n,
            touch=sum(row["touches"] for row in mine),
            strength=found.strengths.get(scenario),
        )
    yield replace(where, scenario="mean", percent=float(np.mean(percents[:-1])))


def differences(
    decided: Mapping[ReadoutKey, Decisions], of: Mapping[str, Stimulus], against: str
) -> list[Difference]:
    """Every source minus the one to compare with, at the same block, timestep, draw and pool; a
    source without noise is the same in all draws."""
    flags: dict[tuple[str, int | None, int | None, int], dict[int | None, list]] = defaultdict(dict)
    for key, found in decided.items():
        place = (key.source, key.block, key.condition.timestep, key.pool)
        flags[place][key.condition.draw] = list(prediction_rows(key, found, of))
    found = []
    for place, ours in flags.items():
        for other, theirs in flags.items():
            if other[0] == against != place[0] and _meet(place, other):
                found += _compare(place, ours, other, theirs)
    return _adjusted(found)


def _meet(a: tuple, b: tuple) -> bool:
    """Whether two places differ in the source alone, or in what one of them does not have."""
    return a[3] == b[3] and all(
        mine == theirs or None in (mine, theirs)
        for mine, theirs in zip(a[1:3], b[1:3], strict=True)
    )


def _compare(
    place: tuple, ours: Mapping[int | None, list], other: tuple, theirs: Mapping[int | None, list]
) -> Iterator[Difference]:
    draws = sorted({draw for draw in (*ours, *theirs) if draw is not None}) or [0]

    def clips(sides: Mapping[int | None, list], scenario: str) -> list[dict[str, Any]]:
        return [
            row | {"prompt_id": row["clip"], "k": draw}
            for draw in draws
            for row in sides[draw if draw in sides else None]
            if scenario in ("all", row["scenario"])
        ]

    source, block, timestep, pool = place
    against, their_block, their_timestep, _ = other
    for scenario in [*sorted({row["scenario"] for rows in ours.values() for row in rows}), "all"]:
        # The other is A: the difference is ours minus theirs.
        both = Pairs.of(clips(theirs, scenario), clips(ours, scenario)).flag("right")
        yield Difference(
            source=source,
            against=against,
            block=block or their_block,
            timestep=timestep if timestep is not None else their_timestep,
            pool=pool,
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


def _adjusted(differences: Sequence[Difference]) -> list[Difference]:
    families: dict[tuple, list[Difference]] = defaultdict(list)
    for found in differences:
        families[found.source, found.block, found.pool].append(found)
    return [
        replace(found, p_holm=p)
        for family in families.values()
        for found, p in zip(family, holm([found.p for found in family]), strict=True)
    ]
