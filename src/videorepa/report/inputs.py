"""Reads what a report is made from: folders of runs, clips, scores, scans and probes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
import yaml
from av.error import FFmpegError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from videorepa import readings
from videorepa.data.files import short_name
from videorepa.data.manifest import read_manifest
from videorepa.errors import UserError

Key = tuple[str, int]
"""Which clip of a generation folder: the prompt's id and the sample's number k."""


@dataclass(frozen=True)
class Sample:
    """A validation clip written during training."""

    path: Path
    prompt: str
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class Run:
    """A training run. samples: optimiser step -> clip's name -> clip."""

    name: str
    folder: Path
    recipe: str
    environment: Mapping[str, Any]
    log: Sequence[Mapping[str, Any]]
    samples: Mapping[int, Mapping[str, Sample]]

    @property
    def last_step(self) -> int:
        return self.log[-1]["step"]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """The steps at which `key` was logged as a finite number, and its values, both (N,)."""
        pairs = [(row["step"], row[key]) for row in self.log if row.get(key) is not None]
        steps, values = np.array(pairs, float).reshape(-1, 2).T
        finite = np.isfinite(values)
        return steps[finite], values[finite]

    def settings(self) -> dict[str, str]:
        """The recipe as dotted names and values."""
        return dict(_flatten(yaml.safe_load(self.recipe)))


class Sidecar(BaseModel):
    """What a generated clip says of itself, with the clip's own path.

    seed, steps, guidance_scale: None for clips from elsewhere, of which nobody says it.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    path: Path
    prompt_id: str
    prompt: str
    k: int
    seed: int | None
    fps: float = Field(gt=0)
    frames: int
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    steps: int | None
    guidance_scale: float | None
    model: str


class Metric(BaseModel):
    """A metric over a folder of clips: a share in percent or a mean, perhaps with an interval."""

    percent: float | None = None
    mean: float | None = None
    n: int | None = None
    low: float | None = None
    high: float | None = None
    invalid: int = 0


class Failure(BaseModel):
    """A clip that could not be scored."""

    prompt_id: str
    k: int
    reason: str


class Summary(BaseModel):
    """A benchmark's metrics over a folder of clips, in all and by scenario.

    about: what the metrics are, in a sentence, where the benchmark says it.
    """

    benchmark: str
    version: str
    about: str | None = None
    metrics: dict[str, Metric]
    by_scenario: dict[str, dict[str, Metric]] = {}
    failures: list[Failure] = []
    missing: list[dict[str, Any]] = []


class Difference(BaseModel):
    """A paired difference to another model, in the metric's own unit (points for a percentage).

    n: pairs. prompts: that they are of, where a prompt may have several.
    """

    difference: float
    low: float
    high: float
    p: float | None = None
    n: int | None = None
    prompts: int | None = None

    @property
    def has_interval(self) -> bool:
        """Not if all pairs differ alike: drawing them anew then gives no other difference."""
        return self.low < self.high

    @property
    def independent(self) -> int | None:
        """How many pairs tell independently of each other, if it is known."""
        return self.n if self.prompts is None else self.prompts


class Comparison(BaseModel):
    against: str
    metrics: dict[str, Difference]
    by_scenario: dict[str, dict[str, Difference]] = {}


class ScoreRow(BaseModel):
    """One clip's scores; what a benchmark writes beside them are its checks."""

    model_config = ConfigDict(extra="allow")

    prompt_id: str
    k: int
    scenario: str | None = None
    sa: float | None = None
    pc: float | None = None
    vq: float | None = None
    joint: float | None = None
    motion: float | None = None

    @property
    def failing_checks(self) -> list[str]:
        """The names of the checks that say False: `gravity` for `checks.gravity_passed`."""
        return [
            name.rpartition(".")[2].removesuffix("_passed").replace("_", " ")
            for name, value in _leaves(self.model_extra or {})
            if value is False
        ]

    def flag(self, metric: str) -> bool | None:
        """Whether the clip passes, where the metric is a share of clips that do."""
        value = getattr(self, metric, None)
        return bool(value) if value in (0, 1) else None


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


@dataclass(frozen=True)
class Scores:
    folder: Path
    summary: Summary
    rows: Mapping[Key, ScoreRow]
    comparison: Comparison | None

    @property
    def failures(self) -> dict[Key, str]:
        return {(item.prompt_id, item.k): item.reason for item in self.summary.failures}


Parsed = TypeVar("Parsed", bound=BaseModel)


def _parse(kind: type[Parsed], data: Any, where: str) -> Parsed:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(
            f"{where}: {field}: {first['msg']}. It was not written by this version of videorepa, "
            "or was edited; write it again."
        ) from error


def _json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing. Expected a JSON object there; was the folder copied?")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Write it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}; expected a JSON object.")
    return data


def _json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file. An unreadable last line is left out, because a process
    that is killed while writing leaves one; anywhere else it means a damaged file."""
    lines = path.read_bytes().splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} of {len(lines)} is not JSON ({error}). Only the last line "
                "may be cut off; delete this one, or restore the file."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is {line[:40]!r}; expected a JSON object.")
        rows.append(row)
    return rows


def _leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _flatten(recipe: Any) -> Iterator[tuple[str, str]]:
    if isinstance(recipe, Mapping):
        for name, value in _leaves(recipe):
            yield name, "none" if value is None else str(value)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """What a run has logged, in the order of its steps, each once. Raises UserError when the log
    is missing, empty or damaged."""
    path = folder / "log.jsonl"
    if not path.is_file():
        raise UserError(
            f"{folder} is a run without log.jsonl. Expected one line per optimiser step there; "
            "has its training started? `videorepa train` writes it."
        )
    # A run that was killed and resumed does some steps twice, and the same way: the later row wins.
    by_step: dict[int, dict[str, Any]] = {}
    for row in _json_lines(path):
        if not isinstance(row.get("step"), int):
            raise UserError(f'{path} has a line without a whole number "step": {str(row)[:80]}')
        for key, value in row.items():
            if isinstance(value, str | list | dict):
                raise UserError(
                    f"{path}, step {row['step']}: {key} is {str(value)[:40]!r}; expected a number."
                )
        by_step[row["step"]] = row
    if not by_step:
        raise UserError(f"{path} holds no complete step yet. Wait for the first, then try again.")
    return [by_step[step] for step in sorted(by_step)]


def _shape(path: Path) -> dict[str, Any] | None:
    """A clip's fps, frames, height and width, or None when it cannot be read: one bad clip should
    not cost the page."""
    try:
        with av.open(str(path.absolute())) as container:
            stream = container.streams.video[0]
            rate, size = stream.average_rate, {"height": stream.height, "width": stream.width}
            return {"fps": float(rate), "frames": stream.frames, **size} if rate else None
    except (FFmpegError, OSError, IndexError):
        return None


def _sample(path: Path) -> Sample | None:
    shape = _shape(path)
    if shape is None:
        return None
    sidecar = path.with_suffix(".json")
    prompt = _json_object(sidecar).get("prompt") if sidecar.is_file() else None
    words = str(prompt or path.stem)
    return Sample(path, words, shape["fps"], shape["width"], shape["height"])


def _samples(folder: Path) -> dict[int, dict[str, Sample]]:
    found: dict[int, dict[str, Sample]] = {}
    for path in sorted(folder.glob("samples/step-*/*.mp4")):
        match = re.fullmatch(r"step-(\d+)", path.parent.name)
        sample = _sample(path) if match and not path.name.startswith(".") else None
        if match and sample:
            found.setdefault(int(match[1]), {})[path.stem] = sample
    return dict(sorted(found.items()))


def read_run(folder: Path, name: str) -> Run:
    """Read a run folder. Raises UserError when it is not one or its log is missing or damaged."""
    recipe = folder / "recipe.yaml"
    if not recipe.is_file():
        what = "does not exist" if not folder.is_dir() else "holds no recipe.yaml"
        raise UserError(
            f"{folder} is not a run folder: it {what}. Expected a folder that `videorepa train` "
            "wrote, with recipe.yaml and log.jsonl in it."
        )
    try:
        text = recipe.read_text("utf-8")
        yaml.safe_load(text)
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise UserError(f"{recipe} is not YAML ({error}). Restore it.") from error
    environment = folder / "environment.json"
    return Run(
        name=name,
        folder=folder,
        recipe=text,
        environment=_json_object(environment) if environment.is_file() else {},
        log=read_log(folder),
        samples=_samples(folder),
    )


def read_generation(folder: Path) -> dict[Key, Sidecar]:
    """Read a generation folder's clips, or those of a list as `evaluate` takes it; a clip whose
    video is missing or empty is left out.

    Raises UserError when there is no clip, or a sidecar or the list is damaged.
    """
    if folder.is_file():
        return _listed(folder)
    clips: dict[Key, Sidecar] = {}
    for sidecar in sorted(folder.glob("*.json")):
        video = sidecar.with_suffix(".mp4")
        # A killed process leaves half-written files behind, under hidden names.
        if sidecar.name.startswith("."):
            continue
        if video.is_file() and video.stat().st_size > 0:
            clip = _parse(Sidecar, {**_json_object(sidecar), "path": video}, str(sidecar))
            clips[clip.prompt_id, clip.k] = clip
    if not clips:
        what = "holds no clip" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {what}. Expected <prompt id>-<k>.mp4 files with a .json beside each, as "
            "`videorepa generate` writes them."
        )
    return clips


def _listed(path: Path) -> dict[Key, Sidecar]:
    clips = {
        (entry.id, 0): Sidecar(
            path=entry.path,
            prompt_id=entry.id,
            prompt=entry.caption,
            k=0,
            model=short_name(path),
            seed=None,
            steps=None,
            guidance_scale=None,
            **shape,
        )
        for entry in read_manifest(path)
        if (shape := _shape(entry.path))
    }
    if not clips:
        raise UserError(f"None of the clips that {path} lists can be read. Are the paths right?")
    return clips


def score_folders(clips: Path) -> list[Path]:
    """What `evaluate` has left of a folder or a list of clips."""
    if not clips.is_file():
        return [path.parent for path in sorted(clips.glob("*/summary.json"))]
    beside = sorted(clips.parent.glob("*/summary.json"))
    return [path.parent for path in beside if path.parent.stem == clips.stem]


def read_scores(folder: Path) -> Scores:
    """Read a score folder. Raises UserError when a file is missing or damaged."""
    table = folder / "scores.jsonl"
    if not table.is_file() or not (folder / "summary.json").is_file():
        raise UserError(
            f"{folder} is not a score folder. Expected scores.jsonl and summary.json in it; "
            "`videorepa evaluate` writes them."
        )
    rows = [_parse(ScoreRow, row, str(table)) for row in _json_lines(table)]
    path = folder / "summary.json"
    comparison = folder / "comparison.json"
    return Scores(
        folder=folder,
        summary=_parse(Summary, _json_object(path), str(path)),
        rows={(row.prompt_id, row.k): row for row in rows},
        comparison=_parse(Comparison, _json_object(comparison), str(comparison))
        if comparison.is_file()
        else None,
    )


def read_scan(folder: Path) -> Scan:
    """Read what `scan` wrote. Raises UserError when it is missing or damaged."""
    return _finished(folder, "scan", Scan)


def read_probe(folder: Path) -> Probe:
    """Read what `probe` wrote. Raises UserError when it is missing or damaged."""
    return _finished(folder, "probe", Probe)


def _finished(folder: Path, verb: str, kind: type[Parsed]) -> Parsed:
    path = folder / f"{verb}.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished {verb}: it holds no {path.name}. Run `videorepa {verb}`."
        )
    return _parse(kind, _json_object(path), str(path))
