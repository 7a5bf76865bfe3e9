"""A run's folder: its recipe, the environment it ran in, its log and its checkpoints."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import subprocess
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from videorepa import checkpoint
from videorepa.backbones import Backbone, Part
from videorepa.checkpoint import Checkpoint
from videorepa.data.files import atomic_write, is_vacant, sweep
from videorepa.errors import UserError
from videorepa.recipe import Recipe

# Changing these does not change what a run computes, but for rounding, so a resumed run may have
# others.
FREE_TO_CHANGE = (
    "about",
    "parallel",
    "parallel.engine",
    "parallel.offload",
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
        checkpoint.put(trained, {key: value for key, value in parameters if key in trained})
        return backbone


def environment() -> dict[str, Any]:
    """Versions, commit and machine, to be written into what a run leaves."""
    packages = ("videorepa", "torch", "diffusers", "transformers", "peft", "accelerate")
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed as a package"
    commit = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return found | {
        "python": platform.python_version(),
        "commit": commit.stdout.strip() or "unknown",
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "gpus": torch.cuda.device_count(),
    }


def differences(a: Any, b: Any, key: str = "") -> list[str]:
    """The dotted names of the values that differ between two nested dictionaries."""
    if isinstance(a, dict) and isinstance(b, dict):
        names = sorted(a.keys() | b.keys())
        inner = (differences(a.get(n), b.get(n), f"{key}.{n}" if key else n) for n in names)
        return [name for names in inner for name in names]
    return [] if a == b else [key]
