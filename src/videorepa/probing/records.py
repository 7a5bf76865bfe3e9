"""Measured numbers, as a scan and a probe write them and a report reads them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from pydantic import BaseModel

from videorepa.artifacts.reading import read_result
from videorepa.errors import UserError
from videorepa.evaluation.statistics import paired_bootstrap
from videorepa.probing import records as readings
from videorepa.probing.clips import Clips
from videorepa.probing.readout import read_label


@dataclass(frozen=True)
class Reading:
    """One measured number.

    measure: "relation_error" and "cka", means over clips, or "contact_auc".
    source: "block"; or "pixels" (mean colours on the teacher's grid), "untrained" (the teacher with
        weights drawn anew) or the "teacher" itself, which are given the clean clip.
    low, high: 95 % interval, by bootstrap over clips. n: clips.
    sd: standard deviation over clips, of what every clip has a number of.
    block: counted from 1. noise: its share of the variance. Both None but for blocks.
    teacher: its name; None for contact read from a block, which no teacher has part in.
    """

    measure: str
    source: str
    value: float
    low: float
    high: float
    n: int
    sd: float | None = None
    block: int | None = None
    noise: float | None = None
    teacher: str | None = None


@dataclass(frozen=True)
class Accuracy:
    """How often one readout is right about test clips.

    scenario: "all" counts all clips; "mean" is the unweighted mean of the scenarios', the published
        number, which has no exact interval.
    percent; low, high: the exact (Clopper-Pearson) 95 % interval, also in percent. touch: clips in
        which the objects touch: to say so always would be right that often.
    strength: the inverse strength of regularisation that was chosen.
    pool: rows and columns that each step's tokens were averaged to.
    """

    source: str
    block: int | None
    timestep: int | None
    draw: int | None
    pool: int
    scenario: str
    percent: float
    low: float | None = None
    high: float | None = None
    right: int | None = None
    n: int | None = None
    touch: int | None = None
    strength: float | None = None


@dataclass(frozen=True)
class Difference:
    """A source minus another over the same clips, in percentage points: `compare_flags`' values.

    p: McNemar's exact test, in every draw alone, the smallest after Holm's adjustment; p_holm:
    adjusted also for all scenarios and timesteps of these two sources, at this pool and block.
    """

    source: str
    against: str
    block: int | None
    timestep: int | None
    pool: int
    scenario: str
    difference: float
    low: float
    high: float
    n: int
    only_source: int
    only_against: int
    p: float
    p_holm: float


def mean_reading(
    measure: str,
    values: Sequence[float],
    source: str,
    block: int | None = None,
    noise: float | None = None,
) -> Reading:
    check_finite(values, source if block is None else f"block {block} at noise {noise:g}")
    low, high = paired_bootstrap([[value] for value in values])
    value, sd = float(np.mean(values)), float(np.std(values, ddof=1))
    return Reading(measure, source, value, low, high, len(values), sd, block, noise)


def contact_reading(
    features: Float[np.ndarray, "n d"],
    clips: Clips,
    source: str,
    block: int | None = None,
    noise: float | None = None,
) -> Reading:
    assert clips.label is not None
    check_finite(features, source if block is None else f"block {block} at noise {noise:g}")
    found = read_label(features, clips.label)
    return Reading(
        "contact_auc", source, found.auc, found.low, found.high, found.n, None, block, noise
    )


def check_finite(values: Sequence[float] | np.ndarray, whose: str) -> None:
    """Raises UserError if any is not."""
    if not np.isfinite(values).all():
        raise UserError(
            f"The features of {whose} are not finite. The weights are damaged, or the precision is "
            "too low: try --train.precision float32."
        )


class Scan(BaseModel):
    """How close a base model's blocks are to teachers, and how well contact is read from them.

    aligned_blocks: those that the recipe aligns. says and notes: sentences.
    """

    teachers: list[str]
    blocks: list[int]
    noise_levels: list[float]
    aligned_blocks: list[int]
    readings: list[readings.Reading]
    notes: list[str]
    says: list[str]
    recipe: str
    environment: dict[str, Any]


class Probe(BaseModel):
    """How well contact is foreseen from the features of models and teachers. against: the source
    that the differences are to."""

    protocol: str
    sources: list[str]
    scenarios: list[str]
    blocks: list[int]
    timesteps: list[int]
    pools: list[int]
    against: str
    accuracies: list[readings.Accuracy]
    differences: list[readings.Difference]
    notes: list[str]
    recipe: str
    environment: dict[str, Any]


def read_scan(folder: Path) -> Scan:
    """Read what `scan` wrote. Raises UserError when it is missing or damaged."""
    return read_result(folder, "scan", Scan)


def read_probe(folder: Path) -> Probe:
    """Read what `probe` wrote. Raises UserError when it is missing or damaged."""
    return read_result(folder, "probe", Probe)
