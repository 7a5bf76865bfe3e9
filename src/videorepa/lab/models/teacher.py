"""Trains the lab's teacher: a small VideoMAE that sees parts of simulated clips and has to say what
comes after.

Tubes of patches are left out, the same ones in every frame, as in VideoMAE (arXiv 2203.12602). Each
token that is left says, through one linear layer, what its place will show in the frames after. So
the knowledge of what will move where has to be in the tokens: a predictor of several layers, as
masked autoencoders have, could keep it to itself. Places where something moves count most.
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

TEACHER_FRAMES = 16

TUBELET = 2

AFTER = 16
"""Frames after those that the encoder is given."""

STILL = 0.05
"""Weight of a patch in which nothing moves, to one in which most does."""


class TeacherRecipe(Section):
    """How the micro teacher is made. mask: share of tubes left out. start: a teacher to go on from,
    instead of from scratch."""

    out: Path
    start: Path | None = None
    steps: int = 4000
    patch: int = 8
    width: int = 192
    layers: int = 6
    heads: int = 6
    mask: float = 0.5
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


class Foreteller(nn.Module):
    """The encoder with its linear head, and the loss of a batch of clips."""

    def __init__(self, recipe: TeacherRecipe) -> None:
        from transformers import VideoMAEConfig, VideoMAEModel

        super().__init__()
        self.recipe, self.side = recipe, SIZE // recipe.patch
        config = VideoMAEConfig(
            image_size=SIZE,
            patch_size=recipe.patch,
            num_frames=TEACHER_FRAMES,
            tubelet_size=TUBELET,
            hidden_size=recipe.width,
            num_hidden_layers=recipe.layers,
            num_attention_heads=recipe.heads,
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
        """video: TEACHER_FRAMES + AFTER frames in [0, 1]."""
        pixels = normalised(video)
        shown = self._patches(pixels)
        hidden = self._left_out(len(video))
        times = TEACHER_FRAMES // TUBELET
        tokens = self.encoder(
            pixels[:, :TEACHER_FRAMES], bool_masked_pos=hidden.repeat(1, times)
        ).last_hidden_state
        told = self.head(tokens).unflatten(1, (times, -1)).unflatten(-1, (AFTER // TUBELET, -1))
        coming = shown[:, times:].transpose(1, 2)
        weight = self._moving(shown)[:, times:].transpose(1, 2)
        kept = [one[~out] for one, out in zip(coming, hidden, strict=True)]
        weights = [one[~out] for one, out in zip(weight, hidden, strict=True)]
        error = (told - torch.stack(kept)[:, None]).square().mean(-1)
        weights = torch.stack(weights)[:, None].expand_as(error)
        return (error * weights).sum() / weights.sum()

    def _left_out(self, count: int) -> Tensor:
        """(count, places) bool: as many in every clip."""
        places = self.side**2
        return torch.rand(count, places).argsort(1) < round(self.recipe.mask * places)

    def _patches(self, pixels: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t n v"]:
        cut = pixels.unflatten(1, (-1, TUBELET))
        cut = cut.unflatten(-1, (self.side, -1)).unflatten(-3, (self.side, -1))
        return cut.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(2, 3).flatten(3)

    def _moving(self, shown: Float[Tensor, "b t n v"]) -> Float[Tensor, "b t n"]:
        """How far a patch is from what its place usually shows: STILL to 1 and a bit."""
        off = (shown - shown.median(1, keepdim=True).values).abs().mean(-1)
        return off / off.amax((1, 2), keepdim=True).clamp(min=1e-6) + STILL


def train_teacher(recipe: TeacherRecipe) -> dict[str, float]:
    """As `train_a_teacher` does."""
    torch.manual_seed(recipe.seed)
    foreteller = Foreteller(recipe)

    def loss(step: int) -> Tensor:
        first = step * recipe.batch
        clips = [
            # Without the first frame, which is a latent frame of its own.
            unlabelled_clip(recipe.seed, first + number, 1 + TEACHER_FRAMES + AFTER)[1:]
            for number in range(recipe.batch)
        ]
        return foreteller(to_video(np.stack(clips)))

    return train_a_teacher(foreteller, loss, recipe)
