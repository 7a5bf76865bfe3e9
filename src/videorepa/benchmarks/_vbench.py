"""VBench's sixteen dimensions (Huang et al. 2024), how they are scaled, and their totals.

A total is linear in the dimensions' means, so that each prompt has a part in it. Several dimensions
share prompts, and intervals and tests of totals draw a prompt with all of its parts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from videorepa.artifacts.scores import Row
from videorepa.evaluation.pairs import mean
from videorepa.evaluation.statistics import sign_flip


class Dimension(NamedTuple):
    """One dimension of VBench.

    Attributes:
        total: The total that it counts in, "quality" or "semantic".
        prompts: Number of its prompts in the published list.
        low: The mean that is scaled to 0.
        high: The mean that is scaled to 1.
        weight: Its weight in the total, relative to the others'.
    """

    total: str
    prompts: int
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


DIMENSIONS = {
    "subject_consistency": Dimension("quality", 72, low=0.1462),
    "background_consistency": Dimension("quality", 86, low=0.2615),
    "temporal_flickering": Dimension("quality", 75, low=0.6293),
    "motion_smoothness": Dimension("quality", 72, low=0.706, high=0.9975),
    "dynamic_degree": Dimension("quality", 72, weight=0.5),
    "aesthetic_quality": Dimension("quality", 93),
    "imaging_quality": Dimension("quality", 93),
    "object_class": Dimension("semantic", 79),
    "multiple_objects": Dimension("semantic", 82),
    "human_action": Dimension("semantic", 100),
    "color": Dimension("semantic", 85),
    "spatial_relationship": Dimension("semantic", 84),
    "scene": Dimension("semantic", 86, high=0.8222),
    "appearance_style": Dimension("semantic", 90, low=0.0009, high=0.2855),
    "temporal_style": Dimension("semantic", 100, high=0.364),
    "overall_consistency": Dimension("semantic", 93, high=0.364),
}

SHARES = {"quality": {"quality": 1.0}, "semantic": {"semantic": 1.0}} | {
    "total": {"quality": 0.8, "semantic": 0.2}
}
"""What each total is a weighted mean of."""

STILL = (
    "subject_consistency",
    "background_consistency",
    "temporal_flickering",
    "motion_smoothness",
)
"""Dimensions in which a clip without motion scores near 1."""

_CLIP = re.compile(r"(?P<prompt>.*)-(?P<k>\d+)", re.DOTALL)

Values = Mapping[str, Mapping[str, Sequence[float]]]
"""The clips' values by dimension and by prompt."""


def scaled(dimension: str, mean: float) -> float:
    """A dimension's mean as it enters the totals."""
    _, _, low, high, _ = DIMENSIONS[dimension]
    return (mean - low) / (high - low)


def clip_of(stem: str) -> tuple[str, int]:
    """The prompt and the sample's number that a file name of VBench's, {prompt}-{k}, stands for."""
    match = _CLIP.fullmatch(stem)
    return (match["prompt"], int(match["k"])) if match else (stem, 0)


def dimension_metric(rows: Sequence[Row], key: str, dimension: str) -> dict[str, Any]:
    """A dimension's mean in percent, with a bootstrap interval over prompts.

    "scaled" is its part in the totals before it is weighted, and "of_prompts" the number of prompts
    in the published list.
    """
    values = mean(rows, key)
    centre = values.pop("mean")
    ends = {end: in_percent(values[end]) for end in ("low", "high")}
    return {
        "percent": in_percent(centre),
        **values,
        **ends,
        "fractions": True,
        "scaled": None if centre is None else scaled(dimension, centre),
        "of_prompts": DIMENSIONS[dimension].prompts,
    }


def in_percent(value: float | None) -> float | None:
    return None if value is None else 100 * value


def totals(means: Mapping[str, float]) -> dict[str, float]:
    """The totals, 0 to 1, that can be told: those of which no dimension lacks.

    Args:
        means: The dimensions' means.
    """
    return {
        name: sum(weight * scaled(key, means[key]) for key, weight in weights.items())
        for name, weights in _weights().items()
        if weights.keys() <= means.keys()
    }


def totals_of(values: Values) -> dict[str, dict[str, Any]]:
    """The totals in percent, each with its bootstrap interval over prompts."""
    means = {key: float(np.mean(_flat(of))) for key, of in values.items() if _flat(of)}
    return {
        name: {"percent": 100 * value} | _interval(100 * value, name, values)
        for name, value in totals(means).items()
    }


def differences_of(differences: Values) -> dict[str, dict[str, Any]]:
    """The differences of totals in points, with interval and p, from differences of clips.

    p is that of flipping the signs of whole prompts.
    """
    present = {key for key, of in differences.items() if _flat(of)}
    result = {}
    for name, weights in _weights().items():
        if weights.keys() <= present:
            parts = list(_parts(name, differences).values())
            value = 100 * sum(parts)
            p = sign_flip([[part * len(parts)] for part in parts])
            result[name] = {"difference": value} | _interval(value, name, differences) | {"p": p}
    return result


def _weights() -> dict[str, dict[str, float]]:
    """The weight of each scaled dimension in each total."""
    whole: dict[str, float] = defaultdict(float)
    for dimension in DIMENSIONS.values():
        whole[dimension.total] += dimension.weight
    return {
        name: {
            key: shares[of.total] * of.weight / whole[of.total]
            for key, of in DIMENSIONS.items()
            if of.total in shares
        }
        for name, shares in SHARES.items()
    }


def _flat(of: Mapping[str, Sequence[float]]) -> list[float]:
    return [value for values in of.values() for value in values]


def _parts(name: str, values: Values, centred: bool = False) -> dict[str, float]:
    """Each prompt's part in a total, as the total's derivative by the dimensions' means has it.

    Args:
        centred: Take the dimensions' means off the values.
    """
    parts: dict[str, float] = defaultdict(float)
    for key, weight in _weights()[name].items():
        every = _flat(values[key])
        centre = float(np.mean(every)) if centred else 0.0
        unit = weight / (DIMENSIONS[key].high - DIMENSIONS[key].low) / len(every)
        for prompt, of in values[key].items():
            parts[prompt] += unit * (sum(of) - centre * len(of))
    return parts


def _interval(value: float, name: str, values: Values, resamples: int = 10_000) -> dict[str, Any]:
    """The 95 % interval in percent, by drawing prompts among those of the same dimensions."""
    parts = _parts(name, values, centred=True)
    alike: dict[frozenset[str], list[float]] = defaultdict(list)
    for prompt, part in parts.items():
        alike[frozenset(key for key, of in values.items() if of.get(prompt))].append(part)
    random = np.random.default_rng(0)
    moved = np.zeros(resamples)
    for of in alike.values():
        drawn = random.multinomial(len(of), np.full(len(of), 1 / len(of)), size=resamples)
        moved += drawn @ np.array(of)
    low, high = value + 100 * np.quantile(moved, [0.025, 0.975])
    return {"low": float(low), "high": float(high), "prompts": len(parts)}
