"""Writes and reads a training run's folder: recipe, log, checkpoints and validation clips."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videorepa.artifacts import checkpoint
from videorepa.artifacts.checkpoint import Checkpoint
from videorepa.artifacts.clips import clip_shape
from videorepa.artifacts.reading import json_lines, json_object, leaves
from videorepa.backbones import Backbone, Part
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.section import read_values
from videorepa.system.environment import environment
from videorepa.system.files import atomic_write, is_vacant, read_bytes
from videorepa.system.progress import console
from videorepa.system.wording import listed

FREE_TO_CHANGE = (
    "about",
    "memory.gradient_checkpointing",
    "memory.offload_activations",
    "parallel",
    "parallel.context",
    "parallel.engine",
    "parallel.offload",
    "parallel.reshard_after_forward",
    "speed.attention",
    "speed.compile",
    "speed.peak_tflops",
    "train.checkpoint_every",
    "train.deterministic",
    "train.keep_checkpoints",
    "train.trackers",
    "validation.drift",
)
"""Settings in which a resumed run may differ: they change results by rounding at most."""

DIVISION = ("optim.batch_size", "optim.accumulate")
"""Settings that divide the clips of a step among processes and passes.

A resumed run may differ in these too, as long as their number stays the same; `train` checks that.
Where samples of a pass are not apart, only the number of passes may change.
"""

_MANY_STEPS = 10**12
"""No training has so many, and doubles tell fewer apart."""


@dataclass(frozen=True)
class ValidationClip:
    """A clip that was generated during training; `fps` is in frames per second."""

    path: Path
    prompt: str
    fps: float
    width: int
    height: int


class Run:
    """The folder of one training run.

    Attributes:
        path: The folder.
        log_path: A JSON-lines file with one line per optimiser step.
        checkpoints: A folder with one folder per checkpoint.
        samples: A folder with one folder of validation clips per step at which there are any.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.log_path = path / "log.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"

    @staticmethod
    def is_one(path: Path) -> bool:
        return (path / "recipe.yaml").is_file()

    @classmethod
    def of(cls, path: Path, recipe: Recipe) -> Run:
        """Give the folder of a new run, or that of the same run to resume it, as it is.

        Raises:
            UserError: The folder holds something else, or a run of another recipe.
        """
        run = cls(path)
        if cls.is_one(path) and run.has_begun:
            differing = differences(
                run.recipe.model_dump(mode="json"), recipe.model_dump(mode="json")
            )
            differing = [key for key in differing if key not in (*FREE_TO_CHANGE, *DIVISION)]
            before = run.recipe.optim.batch_size
            if not differing and before != recipe.optim.batch_size and recipe.mixes_samples:
                raise UserError(
                    f"optim.batch_size is {recipe.optim.batch_size}, and the run in {path} has "
                    f"{before}. What a sample counts for depends here on those beside it (`centre: "
                    "clips`, or a model that is shown all clips of a batch alike). Leave it at "
                    f"{before}, or choose another folder with --out."
                )
            if differing:
                raise UserError(
                    f"{path} holds a run of another recipe; they differ in {', '.join(differing)}. "
                    "Choose another folder with --out, or delete this one."
                )
        elif not cls.is_one(path) and not is_vacant(path):
            raise UserError(f"{path} exists and is not a run. Choose another folder with --out.")
        return run

    @classmethod
    def open(cls, path: Path) -> Run:
        """Open an existing run. Raises UserError if there is none."""
        if not cls.is_one(path):
            what = "has no recipe.yaml" if path.exists() else "does not exist"
            raise UserError(f"{path} is not a run: it {what}. `videorepa train` makes one.")
        return cls(path)

    @property
    def has_begun(self) -> bool:
        """Whether the run has a log or a checkpoint that another recipe would spoil."""
        return self.log_path.exists() or self.checkpoints.exists()

    @property
    def recipe(self) -> Recipe:
        return Recipe.from_yaml(self.path / "recipe.yaml")

    @property
    def recipe_text(self) -> str:
        """The recipe's text, also where this version cannot parse it."""
        return read_bytes(self.path / "recipe.yaml").decode(errors="replace")

    def settings(self) -> dict[str, str]:
        """Read the recipe's values as text, by dotted name. Raises UserError if it is not YAML."""
        values = read_values(self.path / "recipe.yaml")
        return {name: "none" if value is None else str(value) for name, value in leaves(values)}

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions and machine of the latest training process; {} if they were not recorded."""
        path = self.path / "environment.json"
        return json_object(path) if path.is_file() else {}

    def begin(self, recipe: Recipe, contents: Mapping[str, Any], resumed: bool) -> None:
        """Record what the run trains and on which clips, or nothing where it is refused.

        Args:
            recipe: The recipe; of a run that goes on, as it is from now on.
            contents: The clips' count, and a digest each of their ids, captions and videos.
            resumed: Whether the run goes on from a checkpoint.

        Raises:
            UserError: It goes on, and began with other clips: it would take them in another order.
        """
        path = self.path / "clips.json"
        are_recorded = resumed and path.exists()
        if are_recorded:
            before = json_object(path)
            changed = differences(before, contents)
            if changed:
                counts = f"{before.get('count')} clips, and now there are {contents['count']}"
                what = counts if "count" in changed else f"other {listed(changed)}"
                raise UserError(
                    f"{self.path} began with {what}. A run that goes on has to see the same clips "
                    "in the same order. Restore them and run `videorepa prepare`, or choose "
                    "another folder with --out."
                )
        self.path.mkdir(parents=True, exist_ok=True)
        # The recipe makes the folder a run. The process can be killed between any two lines.
        recipe.to_yaml(self.path / "recipe.yaml")
        atomic_write(self.path / "environment.json", json.dumps(environment(), indent=1))
        if are_recorded:
            return
        if resumed:
            console.print(
                f"There is no {path}: the run began with an earlier version, and whether its clips "
                "are still the same cannot be told.",
            )
        atomic_write(path, json.dumps(contents, indent=1))

    # The log.

    @cached_property
    def log(self) -> list[dict[str, Any]]:
        """The record of each optimiser step in order, read once.

        A run that was killed can have logged a step twice; the later record counts. Half a line at
        the end is left out.

        Raises:
            UserError: The log is damaged elsewhere.
        """
        by_step: dict[int, dict[str, Any]] = {}
        for row in json_lines(self.log_path) if self.log_path.exists() else ():
            step = row.get("step")
            if not isinstance(step, int) or isinstance(step, bool) or not 0 < step < _MANY_STEPS:
                raise UserError(
                    f'{self.log_path} has a line without a whole number from 1 as its "step": '
                    f"{str(row)[:80]}"
                )
            for key, value in row.items():
                is_huge = isinstance(value, int) and abs(value) > sys.float_info.max
                if isinstance(value, str | list | dict) or is_huge:
                    raise UserError(
                        f"{self.log_path}, step {row['step']}: {key} is {str(value)[:40]!r}; "
                        "expected a number."
                    )
            by_step[row["step"]] = row
        return [by_step[step] for step in sorted(by_step)]

    @property
    def last_step(self) -> int:
        """The last step in the log. Raises UserError if it has none."""
        if not self.log:
            if self.log_path.exists():
                raise UserError(
                    f"{self.log_path} holds no complete step yet. Wait for the first, then try "
                    "again."
                )
            raise UserError(
                f"{self.path} is a run without log.jsonl. Expected one line per optimiser step "
                "there; has its training started? `videorepa train` writes it."
            )
        return self.log[-1]["step"]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Give the steps at which `key` was logged as a finite number, and its values, all (N,)."""
        pairs = [(row["step"], row[key]) for row in self.log if row.get(key) is not None]
        steps, values = np.array(pairs, float).reshape(-1, 2).T
        finite = np.isfinite(values)
        return steps[finite], values[finite]

    def append(self, row: dict[str, Any]) -> None:
        """Log a step."""
        with self.log_path.open("a") as file:
            file.write(json.dumps(row) + "\n")
        self._forget_log()

    def cut_log(self, step: int) -> None:
        """Remove the records after `step`, since a resumed run repeats those steps."""
        if self.log_path.exists():
            kept = [row for row in self.log if row["step"] <= step]
            atomic_write(self.log_path, "".join(json.dumps(row) + "\n" for row in kept))
            self._forget_log()

    def _forget_log(self) -> None:
        vars(self).pop("log", None)

    # Checkpoints.

    def newest(self) -> Checkpoint | None:
        """Read the newest checkpoint that is whole, to go on from."""
        return checkpoint.newest(self.checkpoints)

    def trained(self, step: int | None = None) -> Checkpoint:
        """Read the weights of a step's checkpoint, by default the newest.

        Raises:
            UserError: There is none, or it is damaged. An earlier one would be another model.
        """
        step = self.trained_step if step is None else step
        return checkpoint.at(self.checkpoints, step, with_moments=False)

    @property
    def trained_step(self) -> int:
        """The step of the newest checkpoint. Raises UserError if there is none."""
        step = checkpoint.last_step(self.checkpoints)
        if step is None:
            raise UserError(f"The run {self.path} has no checkpoint yet. Train it first.")
        return step

    def backbone(
        self,
        parts: tuple[Part, ...],
        device: torch.device,
        dtype: torch.dtype,
        trained: Checkpoint | None = None,
    ) -> Backbone:
        """Load the backbone with the trained weights, or with their averages if the run has them.

        Args:
            parts: The parts of the pipeline to load.
            device: Where to load them.
            dtype: To compute in.
            trained: The checkpoint, if the caller has read it already; by default the newest.
        """
        recipe, trained = self.recipe, trained or self.trained()
        backbone = recipe.backbone.load(parts, device, dtype)
        if recipe.train.lora is not None:
            recipe.backbone.add_lora(backbone.transformer, recipe.train.lora)
        weights = trained.ema or trained.trained
        parameters = backbone.transformer.named_parameters()
        checkpoint.copy_into(weights, {key: p for key, p in parameters if key in weights})
        return backbone

    # Validation clips.

    def sample_path(self, step: int, number: int) -> Path:
        """Give the file of a validation clip of a step, for the prompt with this number."""
        return self.samples / f"step-{step:08d}" / f"{number:02d}.mp4"

    @cached_property
    def validation_clips(self) -> dict[int, dict[str, ValidationClip]]:
        """The readable validation clips, by step and by name."""
        clips: dict[int, dict[str, ValidationClip]] = {}
        for path in sorted(self.samples.glob("step-*/*.mp4")):
            match = re.fullmatch(r"step-(\d+)", path.parent.name)
            shape = clip_shape(path) if match and not path.name.startswith(".") else None
            if match and shape:
                prompt = self._validation_prompts.get(path.stem, path.stem)
                clips.setdefault(int(match[1]), {})[path.stem] = ValidationClip(
                    path, prompt, shape["fps"], shape["width"], shape["height"]
                )
        return dict(sorted(clips.items()))

    @cached_property
    def _validation_prompts(self) -> dict[str, str]:
        """The prompts by the names of their clips, also of a recipe that cannot be parsed here."""
        match read_values(self.path / "recipe.yaml"):
            case {"validation": {"prompts": [*prompts]}}:
                return {self.sample_path(0, n).stem: str(text) for n, text in enumerate(prompts)}
        return {}


def differences(a: Any, b: Any, key: str = "") -> list[str]:
    """Name the values that differ between two nested mappings, by their dotted names."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        names = sorted(a.keys() | b.keys())
        inner = (differences(a.get(n), b.get(n), f"{key}.{n}" if key else n) for n in names)
        return [name for names in inner for name in names]
    return [] if a == b else [key]
