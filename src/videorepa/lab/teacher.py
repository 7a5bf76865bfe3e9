"""Trains the lab's teacher: a small VideoMAE that sees parts of simulated clips and has to say what
the other parts show, and what comes after.

Tubes of patches are hidden, the same ones in every frame, as in VideoMAE (arXiv 2203.12602). What
is asked for is drawn where something moves; half of it lies in the frames after those that the
encoder is given, so that where things are is not enough and how they move has to be known.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD
from videorepa.lab.contact import unlabelled_clip
from videorepa.lab.training import train
from videorepa.lab.world import SIZE
from videorepa.recipe import Section

TEACHER_FRAMES = 16
TUBELET = 2
AFTER = 16
"""Frames after those that the encoder is given."""
STILL = 0.05
"""Chance of a patch in which nothing moves to be asked for, to one in which most moves."""


class TeacherRecipe(Section):
    """How the micro teacher is made. mask: share of tubes hidden. queries: patches asked for in
    each clip, half of them hidden and half to come."""

    out: Path
    steps: int = 4000
    patch: int = 8
    width: int = 192
    layers: int = 6
    heads: int = 6
    mask: float = 0.75
    queries: int = 192
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


class Predictor(nn.Module):
    """Says what patches show, from the encoder's tokens alone: each query looks at the tokens and
    not at other queries (as in CrossMAE, arXiv 2401.14391)."""

    def __init__(self, recipe: TeacherRecipe, places: int, values: int, width: int = 128) -> None:
        super().__init__()
        self.place = nn.Parameter(0.02 * torch.randn(places, width))
        self.entry = nn.Sequential(nn.LayerNorm(recipe.width), nn.Linear(recipe.width, width))
        self.looks = nn.ModuleList(_Look(width) for _ in range(2))
        self.exit = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, values))

    def forward(
        self, tokens: Float[Tensor, "b n d"], where: Int[Tensor, "b q"]
    ) -> Float[Tensor, "b q v"]:
        asked, known = self.place[where], self.entry(tokens)
        for look in self.looks:
            asked = look(asked, known)
        return self.exit(asked)


class _Look(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, asked: Tensor, known: Tensor) -> Tensor:
        asked = asked + self.attention(self.norm1(asked), known, known, need_weights=False)[0]
        return asked + self.mlp(self.norm2(asked))


class Guesser(nn.Module):
    """The encoder with its predictor, and the loss of a batch of clips."""

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
        self.given = TEACHER_FRAMES // TUBELET * self.side**2
        places = self.given + AFTER // TUBELET * self.side**2
        self.predictor = Predictor(recipe, places, TUBELET * 3 * recipe.patch**2)

    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, ""]:
        """video: TEACHER_FRAMES + AFTER frames in [0, 1]."""
        mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
        pixels = (video - mean.view(3, 1, 1)) / std.view(3, 1, 1)
        hidden = self._tubes(len(video))
        tokens = self.encoder(pixels[:, :TEACHER_FRAMES], bool_masked_pos=hidden).last_hidden_state
        shown = self._patches(pixels)
        where = self._places(shown, hidden)
        wanted = shown.gather(1, where[..., None].expand(-1, -1, shown.shape[-1]))
        return (self.predictor(tokens, where) - wanted).square().mean()

    def _tubes(self, count: int) -> Tensor:
        """(count, given) bool, hidden or not: the same patches in all frames."""
        tubes = self.side**2
        visible = tubes - round(self.recipe.mask * tubes)
        order = torch.rand(count, tubes).argsort(1)
        return (order >= visible).repeat(1, self.given // tubes)

    def _patches(self, pixels: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b n v"]:
        cut = pixels.unflatten(1, (-1, TUBELET))
        cut = cut.unflatten(-1, (self.side, -1)).unflatten(-3, (self.side, -1))
        return cut.permute(0, 1, 4, 6, 2, 3, 5, 7).flatten(1, 3).flatten(2)

    def _places(self, shown: Tensor, hidden: Tensor) -> Int[Tensor, "b q"]:
        """What is asked for: hidden patches and later ones, where they differ from what the place
        usually shows."""
        over_time = shown.unflatten(1, (-1, self.side**2))
        moving = (over_time - over_time.median(1, keepdim=True).values).abs().mean(-1).flatten(1)
        chance = moving / moving.amax(1, keepdim=True).clamp(min=1e-6) + STILL
        half = self.recipe.queries // 2
        before = (chance[:, : self.given] * hidden).multinomial(half)
        after = chance[:, self.given :].multinomial(half) + self.given
        return torch.cat([before, after], 1)


def train_teacher(recipe: TeacherRecipe) -> dict[str, float]:
    """Train, write a transformers folder in bf16 and return the mean loss of the last steps.

    A training that was stopped goes on from its last checkpoint, beside `recipe.out`.
    """
    torch.manual_seed(recipe.seed)
    guesser = Guesser(recipe)

    def loss(step: int) -> Tensor:
        first = step * recipe.batch
        clips = [
            # Without the first frame, which is a latent frame of its own.
            unlabelled_clip(recipe.seed, first + number, 1 + TEACHER_FRAMES + AFTER)[1:]
            for number in range(recipe.batch)
        ]
        return guesser(torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255)

    found = train(
        guesser,
        torch.optim.AdamW(
            guesser.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
        ),
        loss,
        steps=recipe.steps,
        rate=lambda progress: recipe.learning_rate * (0.5 + 0.5 * math.cos(math.pi * progress)),
        folder=recipe.out.with_name(f"{recipe.out.name}-checkpoints"),
        seed=recipe.seed,
    )
    guesser.encoder.to(torch.bfloat16).save_pretrained(recipe.out)
    return {"loss": found}
