"""Imports the packages that single settings of a training need."""

from __future__ import annotations

from typing import Any

from videorepa.recipe import Recipe
from videorepa.system.extras import import_extra

_MODULES = {
    "memory.frozen int8": ("torchao.quantization", "torchao"),
    "memory.frozen nf4": ("bitsandbytes.nn", "bitsandbytes"),
    "memory.optimizer adamw8bit": ("bitsandbytes.optim", "bitsandbytes"),
    # torch has a module for it too, which would not name the package in the message.
    "train.trackers tensorboard": ("tensorboard", "tensorboard"),
    "train.trackers wandb": ("wandb", "wandb"),
}
"""The module that a setting needs, and the extra of videorepa that brings it."""


def extra_for(setting: str) -> Any:
    """Import the module that a setting needs, such as "train.trackers wandb".

    Raises:
      UserError: It is not installed.
    """
    return import_extra(*_MODULES[setting], setting)


def check_extras(recipe: Recipe) -> None:
    """Import all that a recipe's training needs. Raises UserError for what is not installed."""
    memory, trackers = recipe.memory, recipe.train.trackers
    settings = [f"memory.frozen {memory.frozen}", f"memory.optimizer {memory.optimizer}"]
    for setting in (*settings, *(f"train.trackers {tracker}" for tracker in trackers)):
        if setting in _MODULES:
            extra_for(setting)
