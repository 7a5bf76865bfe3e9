"""Makes training batches from the cache and from online teachers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import Backbone, Text
from videorepa.data.cache import Cache
from videorepa.data.order import clip_index, sample_numbers
from videorepa.data.source import SourceClip, open_source
from videorepa.data.video import to_video
from videorepa.encoders import EncoderSpec
from videorepa.errors import ClipError, UserError
from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid


@dataclass(frozen=True)
class Batch:
    """All that one micro-batch needs, on the training device.

    Attributes:
      latents: Clean latents at the transformer's scale.
      text: The captions' tensors; a dropped caption's are the empty caption's.
      noise: Standard normal.
      timestep: One for each clip.
      teachers: The clips' features by encoder.
    """

    latents: Float[Tensor, "b f c h w"]
    text: Text
    noise: Float[Tensor, "b f c h w"]
    timestep: Num[Tensor, " b"]
    teachers: dict[EncoderSpec, TokenGrid]


class Loader:
    """Reads a recipe's clips from its cache, and runs its online teachers.

    Args:
      recipe: Names the clips, the cache and the teachers.
      backbone: Scales the latents and samples timesteps.
      device: Where batches go and teachers run.

    Raises:
      UserError: The cache is missing or incomplete.
    """

    def __init__(self, recipe: Recipe, backbone: Backbone, device: torch.device) -> None:
        self.recipe, self.backbone, self.device = recipe, backbone, device
        self.source = open_source(recipe.data)
        self.cache = Cache(recipe)
        dtype = compute_dtype(recipe.train.precision, device)
        self.online = {
            term.encoder: term.encoder.load(device, dtype)
            for term in recipe.terms.values()
            if term.encoder and term.encoder not in recipe.stored_encoders
        }
        self.clips = self.cache.ready(self.source.items)
        self.indices = {clip.id: index for index, clip in enumerate(self.source.items)}
        self.empty_caption = self.cache.read_empty_caption()

    def batches(self, start: int, rank: int, count: int) -> Iterator[Batch]:
        """Give the micro-batches of process `rank` of `count`, from step `start` to the last.

        A thread reads the next one while the caller trains on the latest.
        """
        optim = self.recipe.optim
        batches = (
            self.batch(sample_numbers(step, micro, rank, count, optim.batch_size, optim.accumulate))
            for step in range(start, optim.steps)
            for micro in range(optim.accumulate)
        )
        with ThreadPoolExecutor(1) as pool:
            coming = pool.submit(next, batches, None)
            while (batch := coming.result()) is not None:
                coming = pool.submit(next, batches, None)
                yield batch

    def batch(self, numbers: range) -> Batch:
        """Make a batch of the samples with these numbers, which count over the whole training."""
        seed = self.recipe.seed
        latents, noises, texts, times, grids = [], [], [], [], []
        for number in numbers:
            clip = self.clips[clip_index(seed, number, len(self.clips))]
            draw = generator(seed, "sample", number)
            moments, text = self.cache.read_clip(clip)
            clean = self.backbone.latents(moments[None], draw)
            noises.append(torch.randn(clean.shape, generator=draw))
            times.append(self.backbone.sample_timesteps(clean, draw))
            dropped = torch.rand((), generator=draw).item() < self.recipe.train.caption_dropout
            latents.append(clean)
            texts.append(self.empty_caption if dropped else text)
            grids.append(self._features(clip))
        return Batch(
            torch.cat(latents).to(self.device),
            {name: torch.stack([t[name] for t in texts]).to(self.device) for name in texts[0]},
            torch.cat(noises).to(self.device),
            torch.cat(times).to(self.device),
            {
                encoder: TokenGrid.batch([grid[encoder] for grid in grids]).to(self.device)
                for encoder in grids[0]
            },
        )

    def _features(self, clip: SourceClip) -> dict[EncoderSpec, TokenGrid]:
        """Read or compute each teacher's features of a clip."""
        stored = {
            encoder: self.cache.read_features(clip, encoder) for encoder in self.cache.features
        }
        if not self.online:
            return stored
        try:
            frames = self.source.frames(self.indices[clip.id])
        except ClipError as error:
            raise UserError(
                f"The clip {clip.id!r} can no longer be read ({error}), and the teacher is online. "
                "Run `videorepa prepare` again, or set align.teacher to cached."
            ) from None
        video = to_video(frames)[None]
        return stored | {spec: encoder(video) for spec, encoder in self.online.items()}
