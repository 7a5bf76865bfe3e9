"""A model to sample from or to look into: a run, a recipe or a diffusers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from videorepa.artifacts.checkpoint import Checkpoint
from videorepa.artifacts.run import Run
from videorepa.backbones import Backbone, BackboneSpec, Part
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.device import Precision, compute_dtype
from videorepa.system.fingerprint import json_digest, weights_digest


def default_settings(model: Path, backbone: str = "cogvideox") -> Generation:
    """The settings that `generate` uses for a model unless told otherwise."""
    if Run.is_one(model):
        return Run.open(model).recipe.generation
    return Model.of(model, backbone).settings


@dataclass(frozen=True)
class Model:
    """A model to sample from or to look into: a run, or an untouched base model."""

    name: str
    spec: BackboneSpec
    size: ClipSize
    settings: Generation
    precision: Precision
    run: Run | None = None
    trained: Checkpoint | None = None

    @classmethod
    def of(cls, model: Path, backbone: str = "cogvideox", step: int | None = None) -> Model:
        """What `generate` calls a model. Raises UserError if it is none."""
        if step is not None and not Run.is_one(model):
            raise UserError(f"{model} is not a run, so it has no checkpoint of step {step}.")
        if model.is_file():
            recipe = Recipe.from_yaml(model)
            name = str(recipe.backbone.weights)
        elif Run.is_one(model):
            run = Run.open(model)
            recipe = run.recipe
            # Read once: a full-size checkpoint, optimiser and all, is tens of gigabytes.
            trained = run.trained(step)
            name = f"{recipe.name}, step {trained.step}"
            settings, precision = recipe.generation, recipe.train.precision
            return cls(name, recipe.backbone, recipe.data, settings, precision, run, trained)
        elif (model / "model_index.json").is_file() or str(model) == "micro":
            spec = plugins.description("backbones", backbone)(name=backbone, weights=str(model))
            settings = Generation(**spec.generation)
            return cls(str(model), spec, spec.default_size(), settings, "auto")
        else:
            raise UserError(
                f"{model} is not a run (no recipe.yaml), not a recipe file and not a diffusers "
                "folder (no model_index.json)."
            )
        return cls(name, recipe.backbone, recipe.data, recipe.generation, recipe.train.precision)

    def about(self) -> dict[str, Any]:
        """What a clip's sidecar says of the model."""
        base = self.spec.fingerprint() | {"transformer": self.spec.weights_digest()}
        if self.run is None or self.trained is None:
            return {"model": self.name, "model_digest": json_digest(base)}
        newest = self.run.checkpoints / f"step-{self.trained.step:08d}"
        return {"model": self.name, "model_digest": json_digest([base, weights_digest(newest)])}

    def load(
        self,
        device: torch.device,
        parts: tuple[Part, ...] = ("transformer", "vae", "text_encoder"),
    ) -> Backbone:
        """The live model, with what the run has trained put in."""
        dtype = compute_dtype(self.precision, device)
        if self.run is not None:
            return self.run.backbone(parts, device, dtype, self.trained)
        return self.spec.load(parts, device, dtype)
