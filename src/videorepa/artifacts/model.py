"""Opens a model to sample from or to read features from: a run, a recipe or a diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videorepa.artifacts.checkpoint import Checkpoint, step_folder
from videorepa.artifacts.run import Run
from videorepa.backbones import Backbone, BackboneSpec, Part, pipeline_of
from videorepa.backbones._micro import FROM_IMAGE
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.device import Precision, compute_dtype
from videorepa.system.files import check_is_folder
from videorepa.system.fingerprint import json_digest, weights_digest


def default_settings(model: Path, backbone: str | None = None) -> Generation:
    """Give the settings with which `generate` samples from a model by default."""
    if Run.is_one(model):
        return Run.open(model).recipe.generation
    return Model.of(model, backbone).settings


@dataclass(frozen=True)
class Model:
    """A trained run or an untouched base model.

    Attributes:
        name: Its name in sidecars and tables.
        spec: Describes its backbone.
        size: The size of the clips that it was trained on or is published for.
        settings: How it is sampled from by default.
        precision: The precision to compute in.
        run: The run, if it is one.
        trained: The run's checkpoint.
    """

    name: str
    spec: BackboneSpec
    size: ClipSize
    settings: Generation
    precision: Precision
    run: Run | None = None
    trained: Checkpoint | None = None

    @classmethod
    def of(cls, model: Path, backbone: str | None = None, step: int | None = None) -> Model:
        """Open a model by its path, without loading its weights.

        Args:
            model: A run's folder, a recipe (for its untouched base model), a diffusers folder, or
                "micro" or "micro-i2v".
            backbone: The kind of a diffusers folder; by default the one that loads its pipeline.
            step: The step of the run's checkpoint; by default the newest.

        Raises:
            UserError: The path is none of these, no backbone loads the folder's pipeline, or the
                run has no such checkpoint.
        """
        if step is not None and not Run.is_one(model):
            raise UserError(f"{model} is not a run, so it has no checkpoint of step {step}.")
        if model.is_file():
            recipe = Recipe.from_yaml(model)
            name = str(recipe.backbone.weights)
        elif Run.is_one(model):
            run = Run.open(model)
            recipe = run.recipe
            # Read once, since a full-size checkpoint with its optimiser is tens of gigabytes.
            trained = run.trained(step)
            name = f"{recipe.name}, step {trained.step}"
            settings, precision = recipe.generation, recipe.train.precision
            return cls(name, recipe.backbone, recipe.data, settings, precision, run, trained)
        elif (model / "model_index.json").is_file() or str(model) in ("micro", FROM_IMAGE):
            kind = backbone or _kind_of(model)
            spec = plugins.description("backbones", kind)(name=kind, weights=str(model))
            settings = Generation(**spec.published_generation())
            with spec.described():
                size = spec.default_size()
            return cls(str(model), spec, size, settings, "auto")
        else:
            check_is_folder(model, "a run, a recipe or a diffusers folder")
            raise UserError(
                f"{model} is not a run (no recipe.yaml), not a recipe file and not a diffusers "
                "folder (no model_index.json)."
            )
        return cls(name, recipe.backbone, recipe.data, recipe.generation, recipe.train.precision)

    def about(self) -> dict[str, Any]:
        """Give the model's entries in a sidecar: its name, its digest, and the scheduler that
        samples from it."""
        scheduler = self.spec.load((), torch.device("cpu")).scheduler_about()
        return {"model": self.name, "model_digest": self.digest} | scheduler

    @property
    def digest(self) -> str:
        """The digest of its weights and of the settings of its backbone."""
        if self.run is None or self.trained is None:
            return json_digest(self.spec.identity())
        return trained_digest(self.run, self.spec, self.trained.step)

    def dtype(self, device: torch.device) -> torch.dtype:
        """The dtype that it computes in on a device."""
        return compute_dtype(self.precision, device)

    def load(self, device: torch.device, dtype: torch.dtype, parts: tuple[Part, ...]) -> Backbone:
        """Load the model's parts, with the run's trained weights."""
        if self.run is not None:
            return self.run.backbone(parts, device, dtype, self.trained)
        return self.spec.load(parts, device, dtype)


def _kind_of(model: Path) -> str:
    """The backbone of a diffusers folder, or of a model of the lab's. Raises UserError."""
    if str(model) in ("micro", FROM_IMAGE):
        return "cogvideox"
    pipeline, known = pipeline_of(model), set()
    for kind in plugins.names("backbones"):
        pipelines = plugins.description("backbones", kind).pipelines()
        if pipeline in pipelines:
            return kind
        known.update(pipelines)
    raise UserError(
        f"{model} holds a {pipeline}, which no backbone loads; expected one of "
        f"{', '.join(sorted(known))}."
    )


def trained_digest(run: Run, spec: BackboneSpec, step: int) -> str:
    """The digest of a run's model at a step, by which sidecars and model cards call it."""
    return json_digest([spec.identity(), weights_digest(step_folder(run.checkpoints, step))])
