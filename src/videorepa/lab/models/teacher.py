"""Trains the lab's teacher, a small VideoMAE that predicts what comes after a clip.

Tubes of patches are left out, the same ones in every frame, as in VideoMAE (arXiv 2203.12602). From
each remaining token, one linear layer predicts what the token's place shows in the following
frames. A masked autoencoder's deep decoder could learn the motion instead of the encoder. A linear
layer cannot, so the tokens have to encode it. Places where something moves have the most weight.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.lab.models.masked import MaskedModel, MaskedRecipe, normalised, train_masked
from videorepa.settings.bounds import AtOnce, Layers, Number, Seed, Share, Width
from videorepa.world.contact import unlabelled_clip
from videorepa.world.simulator import SIZE

TEACHER_FRAMES = 16

TUBELET = 2

AFTER = 16
"""Number of frames to predict, directly after those that the encoder sees."""

STILL = 0.05
"""Weight of a patch in which nothing moves. The patch with the most motion has 1 more."""


class TeacherRecipe(MaskedRecipe):
    """The recipe of the teacher. `mask` is the share of tubes that are left out.

    Attributes:
        start: A teacher to continue from. By default the training starts from scratch.
    """

    start: Path | None = None
    steps: Number = 4000
    width: Width = 192
    layers: Layers = 6
    heads: Layers = 6
    mask: Share = 0.5
    batch: AtOnce = 32
    seed: Seed = 0


class FuturePredictor(MaskedModel):
    """The encoder with a linear head that predicts the pixels of the following frames."""

    def __init__(self, recipe: TeacherRecipe) -> None:
        from transformers import VideoMAEConfig, VideoMAEModel

        super().__init__()
        self.recipe, self.side = recipe, SIZE // recipe.patch
        config = VideoMAEConfig(
            **recipe.sizes(),
            num_frames=TEACHER_FRAMES,
            tubelet_size=TUBELET,
            intermediate_size=4 * recipe.width,
            use_mean_pooling=True,
            layer_norm_eps=1e-6,
        )
        self.encoder: Any = VideoMAEModel(config)
        if recipe.start is not None:
            self.encoder = VideoMAEModel.from_pretrained(recipe.start).float()
        values = TUBELET * 3 * recipe.patch**2
        self.head = nn.Linear(recipe.width, AFTER // TUBELET * values)

    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, ""]:
        """Squared error of the predicted patches, averaged with `_motion` as weights.

        Args:
            video: TEACHER_FRAMES + AFTER frames in [0, 1].
        """
        pixels = normalised(video)
        patches = self._patches(pixels)
        hidden = self.recipe.hidden(len(video), self.side**2)
        times = TEACHER_FRAMES // TUBELET
        tokens = self.encoder(
            pixels[:, :TEACHER_FRAMES], bool_masked_pos=hidden.repeat(1, times)
        ).last_hidden_state
        predicted = self.head(tokens).unflatten(1, (times, -1))
        predicted = predicted.unflatten(-1, (AFTER // TUBELET, -1))
        future = _of_places(patches[:, times:], ~hidden)
        weights = _of_places(self._motion(patches)[:, times:], ~hidden)
        error = (predicted - future).square().mean(-1)
        weights = weights.expand_as(error)
        return (error * weights).sum() / weights.sum()

    def _patches(self, pixels: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t n v"]:
        cut = pixels.unflatten(1, (-1, TUBELET))
        cut = cut.unflatten(-1, (self.side, -1)).unflatten(-3, (self.side, -1))
        return cut.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(2, 3).flatten(3)

    def _motion(self, patches: Float[Tensor, "b t n v"]) -> Float[Tensor, "b t n"]:
        """Distance of a patch from its place's median, over the clip's largest, plus STILL."""
        off = (patches - patches.median(1, keepdim=True).values).abs().mean(-1)
        return off / off.amax((1, 2), keepdim=True).clamp(min=1e-6) + STILL


def _of_places(values: Float[Tensor, "b t n *v"], kept: Tensor) -> Float[Tensor, "b 1 k t *v"]:
    """The values of the kept places, equally many in each clip, to compare with all times."""
    by_place = values.transpose(1, 2)
    return torch.stack([clip[mask] for clip, mask in zip(by_place, kept, strict=True)])[:, None]


def train_teacher(recipe: TeacherRecipe) -> dict[str, float]:
    """Train the teacher. See `train_masked`."""
    # Without the first frame, which alone makes up a latent frame.
    frames = 1 + TEACHER_FRAMES + AFTER
    return train_masked(
        FuturePredictor, recipe, lambda number: unlabelled_clip(recipe.seed, number, frames)[1:]
    )
