"""A run's folder: its recipe, the environment it ran in, its log and its checkpoints."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from videorepa.artifacts import checkpoint
from videorepa.artifacts.checkpoint import Checkpoint
from videorepa.artifacts.clips import clip_shape
from videorepa.artifacts.reading import json_lines, json_object, leaves
from videorepa.backbones import Backbone, Part
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.system.environment import environment
from videorepa.system.files import atomic_write, is_vacant, sweep

# Changing these does not change what a run computes, but for rounding, so a resumed run may have
# others.
FREE_TO_CHANGE = (
    "about",
    "parallel",
    "parallel.engine",
    "parallel.offload",
    "parallel.reshard_after_forward",
    "train.checkpoint_every",
    "train.keep_checkpoints",
    "train.trackers",
    "validation.drift",
)

# How a step's clips are divided among processes and passes. A resumed run may divide them
# otherwise; `train` sees to it that they stay as many.
DIVISION = ("optim.batch_size", "optim.accumulate")


class Run:
    """The folder of one training run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_path = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    @staticmethod
    def is_one(path: Path) -> bool:
        return (path / "recipe.yaml").is_file()

    @classmethod
    def begin(cls, path: Path, recipe: Recipe) -> Run:
        """A new run's folder, or the same run's, to go on with.

        Raises UserError if the folder holds something else or a run of another recipe.
        """
        run = cls(path)
        if cls.is_one(path) and run.has_begun:
            differing = differences(
                run.recipe.model_dump(mode="json"), recipe.model_dump(mode="json")
            )
            differing = [key for key in differing if key not in (*FREE_TO_CHANGE, *DIVISION)]
            if differing:
                raise UserError(
                    f"{path} holds a run of another recipe; they differ in {', '.join(differing)}. "
                    "Choose another folder with --out, or delete this one."
                )
        elif not cls.is_one(path) and not is_vacant(path):
            raise UserError(f"{path} exists and is not a run. Choose another folder with --out.")
        path.mkdir(parents=True, exist_ok=True)
        for folder in (path, *run.samples.glob("step-*")):
            sweep(folder)
        # First, since it makes the folder a run: a process can be killed between any two lines.
        recipe.to_yaml(path / "recipe.yaml")
        atomic_write(path / "environment.json", json.dumps(environment(), indent=1))
        return run

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to lose: a step that was logged, or a checkpoint."""
        return self.log_path.exists() or self.checkpoints.exists()

    @classmethod
    def open(cls, path: Path) -> Run:
        """An existing run. Raises UserError if there is none."""
        if not cls.is_one(path):
            raise UserError(
                f"{path} is not a run: it has no recipe.yaml. `videorepa train` makes one."
            )
        return cls(path)

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_yaml(self.path / "recipe.yaml")

    def newest(self) -> Checkpoint | None:
        return checkpoint.newest(self.checkpoints)

    def trained(self, step: int | None = None) -> Checkpoint:
        """The newest checkpoint, or the one of a step. Raises UserError if there is none."""
        if step is not None:
            return checkpoint.at(self.checkpoints, step)
        found = self.newest()
        if found is None:
            raise UserError(f"The run {self.path} has no usable checkpoint yet. Train it first.")
        return found

    def logged(self) -> list[dict[str, Any]]:
        """What the log says of each step; half a line, of a process that was killed, is no step."""
        rows = []
        for line in self.log_path.read_text().splitlines() if self.log_path.exists() else ():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and "step" in row:
                    rows.append(row)
        return rows

    def cut_log(self, step: int) -> None:
        """Drop what was logged after `step`, which a resumed run does again."""
        if self.log_path.exists():
            kept = [row for row in self.logged() if row["step"] <= step]
            atomic_write(self.log_path, "".join(json.dumps(row) + "\n" for row in kept))

    def log(self, values: dict[str, Any]) -> None:
        with self.log_path.open("a") as file:
            file.write(json.dumps(values) + "\n")

    def backbone(
        self,
        parts: tuple[Part, ...],
        device: torch.device,
        dtype: torch.dtype,
        found: Checkpoint | None = None,
    ) -> Backbone:
        """The recipe's backbone with what the run has trained put in, averages if it keeps them.

        found: the checkpoint, if it has been read already; by default the newest.
        """
        recipe, found = self.recipe, found or self.trained()
        backbone = recipe.backbone.load(parts, device, dtype)
        if recipe.train.lora is not None:
            recipe.backbone.add_lora(backbone.transformer, recipe.train.lora)
        trained = found.ema or found.trained
        parameters = backbone.transformer.named_parameters()
        checkpoint.copy_into(trained, {key: value for key, value in parameters if key in trained})
        return backbone


def differences(a: Any, b: Any, key: str = "") -> list[str]:
    """The dotted names of the values that differ between two nested dictionaries."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys())
        inner = (differences(a.get(n), b.get(n), f"{key}.{n}" if key else n) for n in names)
        return [name for names in inner for name in names]
    return [] if a == b else [key]


@dataclass(frozen=True)
class Sample:
    """A validation clip written during training."""

    path: Path
    prompt: str
    fps: float
    width: int
    height: int


@dataclass(frozen=True)
class LoggedRun:
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


def _flatten(recipe: Any) -> Iterator[tuple[str, str]]:
    if isinstance(recipe, Mapping):
        for name, value in leaves(recipe):
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
    for row in json_lines(path):
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


def _sample(path: Path) -> Sample | None:
    shape = clip_shape(path)
    if shape is None:
        return None
    sidecar = path.with_suffix(".json")
    prompt = json_object(sidecar).get("prompt") if sidecar.is_file() else None
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


def read_run(folder: Path, name: str) -> LoggedRun:
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
    return LoggedRun(
        name=name,
        folder=folder,
        recipe=text,
        environment=json_object(environment) if environment.is_file() else {},
        log=read_log(folder),
        samples=_samples(folder),
    )
