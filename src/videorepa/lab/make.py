"""Makes one part of the lab's micro models from its recipe."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path

import yaml
from pydantic import ValidationError

from videorepa.data.files import atomic_write
from videorepa.device import keep_freed_memory
from videorepa.errors import UserError

PARTS = {
    "text-encoder": ("text_encoder", "TextEncoderRecipe", "train_text_encoder"),
    "autoencoder": ("autoencoder", "AutoencoderRecipe", "train_autoencoder"),
    "teacher": ("teacher", "TeacherRecipe", "train_teacher"),
    "image-teacher": ("image_teacher", "ImageTeacherRecipe", "train_image_teacher"),
    "assemble": ("assemble", "AssembleRecipe", "assemble"),
    "ship": ("assemble", "ShipRecipe", "ship"),
    "phyworld": ("phyworld", "PhyWorldRecipe", "draw_clips"),
    "contact": ("contact", "ContactRecipe", "draw_contact"),
    "laws": ("calibration", "LawsRecipe", "calibrate_laws"),
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
