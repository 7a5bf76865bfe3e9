"""Trains the lab's image teacher, a small vision transformer of DINOv2's class.

It sees single frames with hidden patches and predicts the pixels of those patches, as in SimMIM
(arXiv 2111.09886). It represents REPA's image teachers: it can learn how things look, but not how
they move.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from videorepa.lab.models.masked import MaskedModel, MaskedRecipe, normalised, train_masked
from videorepa.settings.bounds import AtOnce, Layers, Number, Seed, Share, Width
from videorepa.world.contact import unlabelled_clip


class ImageTeacherRecipe(MaskedRecipe):
    """The recipe of the image teacher. Each frame of a batch is from another clip."""

    steps: Number = 1500
    width: Width = 96
    layers: Layers = 4
    heads: Layers = 4
    mask: Share = 0.6
    batch: AtOnce = 64
    seed: Seed = 1


class PatchPredictor(MaskedModel):
    """The encoder with a linear head that predicts a patch's pixels."""

    def __init__(self, recipe: ImageTeacherRecipe) -> None:
        from transformers import Dinov2Config, Dinov2Model

        super().__init__()
        self.recipe = recipe
        self.encoder: Any = Dinov2Model(Dinov2Config(**recipe.sizes()))
        self.head = nn.Linear(recipe.width, 3 * recipe.patch**2)

    def forward(self, frames: Float[Tensor, "b 3 h w"]) -> Float[Tensor, ""]:
        """Mean squared error over the hidden patches of frames in [0, 1]."""
        pixels = normalised(frames)
        patch = self.recipe.patch
        patches = nn.functional.unfold(pixels, patch, stride=patch).mT
        hidden = self.recipe.hidden(*patches.shape[:2])
        tokens = self.encoder(pixels, bool_masked_pos=hidden).last_hidden_state[:, 1:]
        return (self.head(tokens) - patches)[hidden].square().mean()


def train_image_teacher(recipe: ImageTeacherRecipe) -> dict[str, float]:
    """Train the image teacher. See `train_masked`."""
    return train_masked(
        PatchPredictor, recipe, lambda number: unlabelled_clip(recipe.seed, number, 1)[0]
    )
