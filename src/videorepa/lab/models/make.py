"""Makes one part of the lab's micro models from its recipe."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

from videorepa.settings.section import Section, read_values
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
    "pairs": ("datasets", "PairsRecipe", "draw_pairs"),
    "laws": ("calibration.tolerances", "LawsRecipe", "calibrate_laws"),
}
"""For each part: its module, imported only when needed, its recipe's class and its function."""


def make(part: str, path: Path) -> dict[str, float]:
    """Make a part from the recipe at `path`.

    Args:
        part: A key of PARTS.

    Returns:
        The part's measurements, which are also written as JSON beside the part's folder, if it has
        one.

    Raises:
        UserError: The recipe cannot be read or does not describe this part.
    """
    module_name, recipe_class, function = PARTS[part]
    module = import_module(f"videorepa.lab.{module_name}")
    kind: type[Section] = getattr(module, recipe_class)
    recipe: Any = kind.checked(read_values(path), f"{path} is not a recipe for {part}")
    keep_freed_memory()
    measured = getattr(module, function)(recipe)
    if recipe.out.is_dir():
        atomic_write(
            recipe.out.with_name(f"{recipe.out.name}-{part}.json"), json.dumps(measured, indent=1)
        )
    return measured
