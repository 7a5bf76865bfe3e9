"""Measured numbers, as a scan and a probe write them and a report reads them."""

from __future__ import annotations

from dataclasses import dataclass


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
