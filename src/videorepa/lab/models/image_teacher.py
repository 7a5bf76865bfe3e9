"""Trains the lab's image teacher: a small vision transformer of DINOv2's class that sees single
frames with patches hidden and has to say what those show (as in SimMIM, arXiv 2111.09886).

It is what REPA has for a teacher of pictures: it can know how things look, and not how they move.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.data.video import to_video
from videorepa.lab.models.training import normalised, train_a_teacher
from videorepa.settings.section import Section
from videorepa.world.contact import unlabelled_clip
from videorepa.world.simulator import SIZE


class ImageTeacherRecipe(Section):
    """How the image teacher is made. mask: share of patches hidden. batch: frames, each of a clip
    of its own."""

    out: Path
    steps: int = 1500
    patch: int = 8
    width: int = 96
    layers: int = 4
    heads: int = 4
    mask: float = 0.6
    batch: int = 64
    learning_rate: float = 1e-3
    seed: int = 1


class Guesser(nn.Module):
    """The encoder with a linear head, and the loss of a batch of frames."""

    def __init__(self, recipe: ImageTeacherRecipe) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        self.patch, self.mask = recipe.patch, recipe.mask
        config = Dinov2Config(
            image_size=SIZE,
            patch_size=recipe.patch,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
        )
        self.encoder: Any = Dinov2Model(config)
        self.head = nn.Linear(recipe.width, 3 * recipe.patch**2)

    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """frames: in [0, 1]."""
        pixels = normalised(frames)
        wanted = nn.functional.unfold(pixels, self.patch, stride=self.patch).mT
        hidden = torch.rand(wanted.shape[:2]).argsort(1) < round(self.mask * wanted.shape[1])
        tokens = self.encoder(pixels, bool_masked_pos=hidden).last_hidden_state[:, 1:]
        return (self.head(tokens) - wanted)[hidden].square().mean()


def train_image_teacher(recipe: ImageTeacherRecipe) -> dict[str, float]:
    """As `train_a_teacher` does."""
    torch.manual_seed(recipe.seed)
    guesser = Guesser(recipe)

    def loss(step: int) -> Tensor:
        first = step * recipe.batch
        frames = np.stack(
            [unlabelled_clip(recipe.seed, first + item, 1)[0] for item in range(recipe.batch)]
        )
        return guesser(to_video(frames))

    return train_a_teacher(guesser, loss, recipe)
