"""The base of the lab's two teachers: vision transformers that predict hidden content."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from pydantic import Field, model_validator
from torch import Tensor, nn

from videorepa.data.video import to_video
from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD
from videorepa.lab.models.training import train
from videorepa.settings.bounds import AtOnce, Layers, Number, Seed, Share, Side, Width
from videorepa.settings.section import Section
from videorepa.world.simulator import SIZE


class MaskedRecipe(Section):
    """The recipe of a teacher.

    Attributes:
        out: The teacher's folder.
        patch: Side of a patch in pixels.
        mask: Share of a frame's patches that are hidden, in [0, 1].
        batch: Number of clips or frames in a step.
        learning_rate: The highest learning rate, from which half a cosine falls to 0.
    """

    out: Path
    steps: Number
    patch: Side = 8
    width: Width
    layers: Layers
    heads: Layers
    mask: Share
    batch: AtOnce
    learning_rate: float = Field(default=1e-3, gt=0)
    seed: Seed

    @model_validator(mode="after")
    def _divides(self) -> MaskedRecipe:
        if SIZE % self.patch or self.width % self.heads:
            raise ValueError(f"patch must divide {SIZE}, and heads must divide width")
        return self

    def sizes(self) -> dict[str, Any]:
        """The encoder's sizes, by their names in a transformers configuration."""
        return {
            "image_size": SIZE,
            "patch_size": self.patch,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
        }

    def hidden(self, count: int, places: int) -> Tensor:
        """(count, places) bool: random places to hide, the same number in each row."""
        return torch.rand(count, places).argsort(1) < round(self.mask * places)


class MaskedModel(nn.Module):
    """An encoder with a head. It maps pixels (b, ..., 3, h, w) in [0, 1] to the loss."""

    encoder: Any


def normalised(frames: Float[Tensor, "*b 3 h w"]) -> Float[Tensor, "*b 3 h w"]:
    """Frames in [0, 1], normalised by ImageNet's mean and deviation as teachers expect them."""
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return (frames - mean.view(3, 1, 1)) / std.view(3, 1, 1)


def train_masked(
    kind: Callable[[Any], MaskedModel], recipe: MaskedRecipe, example: Callable[[int], np.ndarray]
) -> dict[str, float]:
    """Train a teacher and write its encoder to `recipe.out`, a transformers folder in bfloat16.

    A stopped training resumes from its last checkpoint, in a folder beside `recipe.out`.

    Args:
        kind: Makes the model from the recipe.
        example: Makes the example with a number, counted from 0: uint8 of shape (..., h, w, 3).

    Returns:
        The mean loss of the last 100 steps.
    """
    torch.manual_seed(recipe.seed)
    model = kind(recipe)

    def loss(step: int) -> Tensor:
        first = step * recipe.batch
        batch = np.stack([example(first + number) for number in range(recipe.batch)])
        return model(to_video(batch))

    value = train(
        model,
        torch.optim.AdamW(
            model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
        ),
        loss,
        steps=recipe.steps,
        rate=lambda progress: recipe.learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress)),
        out=recipe.out,
        seed=recipe.seed,
    )
    model.encoder.to(torch.bfloat16).save_pretrained(recipe.out)
    return {"loss": value}
