"""Writes and reads the numbers that `scan` and `probe` leave in a folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from videorepa.artifacts.reading import read_result
from videorepa.system.files import atomic_write, csv_text


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """How close something is to a teacher, or how its relations spread: a mean over clips.

    Attributes:
        measure: "relation_error" (0 to 2, lower is closer), "relation_correlation" (-1 to 1, higher
            is closer), "clip_correlation" (-2 to 2, higher is closer) or "cka" (0 to 1, higher is
            closer); "relation_mean" or "relation_spread".
        source: "block"; a straw man that sees the clean clip: "pixels" or "untrained"; or
            "teacher", for its own clip correlation, mean and spread.
        value: The mean.
        low: Lower end of its 95 % interval, by bootstrap over clips.
        high: Upper end of the interval.
        n: Number of clips.
        sd: Standard deviation over clips.
        block: Number of the block, counted from 1; None for others.
        noise: The noise's share of the latents' variance, 0 to 1; None for others.
        teacher: Name of the teacher.
    """

    measure: str
    source: str
    value: float
    low: float
    high: float
    n: int
    sd: float
    block: int | None
    noise: float | None
    teacher: str


class Scan(BaseModel):
    """How close a base model's blocks are to teachers.

    Attributes:
        aligned_blocks: Blocks that the recipe aligns.
        notes: Sentences about clips that were left out, and why.
        says: Sentences about the measurements.
        recipe: The recipe as YAML.
    """

    teachers: list[str]
    blocks: list[int]
    noise_levels: list[float]
    aligned_blocks: list[int]
    measurements: list[Measurement]
    notes: list[str]
    says: list[str]
    recipe: str
    environment: dict[str, Any]

    def write(self, folder: Path) -> None:
        """Write scan.json and scan.csv."""
        _write_table(folder / "scan.csv", Measurement, self.measurements)
        _write_json(folder / "scan.json", self)

    @classmethod
    def read(cls, folder: Path) -> Scan:
        """Read what `write` wrote. Raises UserError if it is missing or damaged."""
        return read_result(folder, "scan", cls)


@dataclass(frozen=True)
class Accuracy:
    """How often one readout is right about test clips.

    Attributes:
        block: Number of the model's block, counted from 1; None for an encoder.
        timestep: Timestep of the noise; None for an encoder, which sees the clean clip.
        draw: Number of the draw of noise, counted from 0; None for an encoder.
        pool: Rows and columns that the tokens of each step were averaged to.
        scenario: A scenario's name; "all" for all clips; or "mean" for the unweighted mean over
            scenarios, which papers report and which has no exact interval.
        percent: Share of clips that the readout is right about.
        low: Lower end of the exact (Clopper-Pearson) 95 % interval, in percent.
        high: Upper end of the interval, in percent.
        right: Number of clips that the readout is right about.
        n: Number of clips.
        touch: Number of clips in which the objects touch.
        strength: The inverse strength of regularisation that was chosen.
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
class AccuracyDifference:
    """A source minus another over the same clips, in percentage points.

    Attributes:
        low: Lower end of the difference's 95 % interval.
        high: Upper end of the interval.
        n: Number of pairs, which is clips times draws.
        only_source: Number of pairs in which only the source is right.
        only_against: Number of pairs in which only the other is right.
        p: The smallest p of McNemar's exact test over the draws, after Holm's adjustment for them.
        p_holm: `p` adjusted also for all scenarios and timesteps of these two sources at this pool
            and block.
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


class Probe(BaseModel):
    """How well contact can be predicted from the features of models and encoders.

    Attributes:
        steps: The step of the checkpoint that was read, by the names of sources that are runs.
        against: The source with which the others are compared.
        notes: Sentences about what is odd in the data.
        failures: Why a clip could not be read, by the clip's id.
        recipe: The recipe as YAML.
    """

    protocol: str
    sources: list[str]
    scenarios: list[str]
    blocks: list[int]
    timesteps: list[int]
    pools: list[int]
    steps: dict[str, int] = {}
    against: str
    accuracies: list[Accuracy]
    differences: list[AccuracyDifference]
    notes: list[str]
    failures: dict[str, str] = {}
    recipe: str
    environment: dict[str, Any]

    @property
    def remarks(self) -> list[str]:
        """The notes, and a sentence for each clip that could not be read."""
        failures = self.failures.items()
        return self.notes + [f"The clip {clip} was left out: {why}." for clip, why in failures]

    def write(self, folder: Path) -> None:
        """Write probe.json, accuracies.csv and differences.csv."""
        _write_table(folder / "accuracies.csv", Accuracy, self.accuracies)
        _write_table(folder / "differences.csv", AccuracyDifference, self.differences)
        _write_json(folder / "probe.json", self)

    @classmethod
    def read(cls, folder: Path) -> Probe:
        """Read what `write` wrote. Raises UserError if it is missing or damaged."""
        return read_result(folder, "probe", cls)


def _write_table(path: Path, row: type, items: Sequence[Any]) -> None:
    columns = [field.name for field in fields(row)]
    atomic_write(path, csv_text(columns, [asdict(item) for item in items]))


def _write_json(path: Path, record: BaseModel) -> None:
    atomic_write(path, json.dumps(record.model_dump(), indent=1))
