"""Makes one part of the lab's micro models from its recipe."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from pydantic import ValidationError

from videorepa.data.files import atomic_write
from videorepa.errors import UserError


def make(part: str, path: Path) -> dict[str, float]:
    """Run the recipe at `path` and give what was measured, which is also written beside a model's
    folder.

    part: "text-encoder", "autoencoder", "teacher", "assemble" or "laws". Raises UserError for a
        bad recipe.
    """
    from videorepa.lab.assemble import AssembleRecipe, ShipRecipe, assemble, ship
    from videorepa.lab.autoencoder import AutoencoderRecipe, train_autoencoder
    from videorepa.lab.calibration import LawsRecipe, calibrate_laws
    from videorepa.lab.teacher import TeacherRecipe, train_teacher
    from videorepa.lab.text_encoder import TextEncoderRecipe, train_text_encoder

    kind, run = {
        "text-encoder": (TextEncoderRecipe, train_text_encoder),
        "autoencoder": (AutoencoderRecipe, train_autoencoder),
        "teacher": (TeacherRecipe, train_teacher),
        "assemble": (AssembleRecipe, assemble),
        "ship": (ShipRecipe, ship),
        "laws": (LawsRecipe, calibrate_laws),
    }[part]
    try:
        recipe = kind.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError, ValidationError) as error:
        raise UserError(f"{path} is not a recipe for {part}: {error}") from None
    measured = run(recipe)
    if recipe.out.is_dir():
        atomic_write(
            recipe.out.with_name(f"{recipe.out.name}-{part}.json"), json.dumps(measured, indent=1)
        )
    return measured
