"""Makes one part of the lab's micro models from its recipe."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import yaml
from pydantic import ValidationError

from videorepa.errors import UserError
from videorepa.system.device import keep_freed_memory
from videorepa.system.files import atomic_write

PARTS = {
    "text-encoder": ("models.text_encoder", "TextEncoderRecipe", "train_text_encoder"),
    "autoencoder": ("models.autoencoder", "AutoencoderRecipe", "train_autoencoder"),
    "teacher": ("models.teacher", "TeacherRecipe", "train_teacher"),
    "image-teacher": ("models.image_teacher", "ImageTeacherRecipe", "train_image_teacher"),
    "assemble": ("models.assemble", "AssembleRecipe", "assemble"),
    "ship": ("models.assemble", "ShipRecipe", "ship"),
    "phyworld": ("datasets", "PhyWorldRecipe", "draw_clips"),
    "contact": ("datasets", "ContactRecipe", "draw_contact"),
    "laws": ("calibration.tolerances", "LawsRecipe", "calibrate_laws"),
}
"""For each part: its file, imported only when it is made, the recipe's class and what makes it."""


def make(part: str, path: Path) -> dict[str, float]:
    """Run the recipe at `path` and give what was measured, which is also written beside a model's
    folder.

    part: one of PARTS. Raises UserError for a bad recipe.
    """
    file, described, run = PARTS[part]
    module = import_module(f"videorepa.lab.{file}")
    kind, run = getattr(module, described), getattr(module, run)
    try:
        recipe = kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path} is not a recipe for {part}: {error}") from None
    keep_freed_memory()
    measured = run(recipe)
    if recipe.out.is_dir():
        atomic_write(
            recipe.out.with_name(f"{recipe.out.name}-{part}.json"), json.dumps(measured, indent=1)
        )
    return measured
