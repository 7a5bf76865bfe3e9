"""Turns sample numbers into training batches, from the cache and from online teachers."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import Backbone, Text
from videorepa.data.cache import Cache
from videorepa.data.order import clip_index
from videorepa.data.source import Item, open_source
from videorepa.data.video import to_video
from videorepa.encoders import EncoderSpec
from videorepa.errors import ClipError, UserError
from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid


class Loader:
    """Turns sample numbers into batches, from the cache and from teachers that are online."""

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
        self.items = self.cache.ready(self.source.items)
        self.place = {item.id: index for index, item in enumerate(self.source.items)}
        self.empty = self.cache.read_empty_caption()

    def batch(self, numbers: range) -> Batch:
        seed = self.recipe.seed
        latents, noises, texts, times, grids = [], [], [], [], []
        for number in numbers:
            item = self.items[clip_index(seed, number, len(self.items))]
            draw = generator(seed, "sample", number)
            moments, text = self.cache.read_clip(item)
            clean = self.backbone.latents(moments[None], draw)
            noises.append(torch.randn(clean.shape, generator=draw))
            times.append(self.backbone.sample_timesteps(clean, draw))
            dropped = torch.rand((), generator=draw).item() < self.recipe.train.caption_dropout
            latents.append(clean)
            texts.append(self.empty if dropped else text)
            grids.append(self._teachers(item))
        return Batch(
            torch.cat(latents).to(self.device),
            {name: torch.stack([t[name] for t in texts]).to(self.device) for name in texts[0]},
            torch.cat(noises).to(self.device),
            torch.cat(times).to(self.device),
            {encoder: self._stacked([grid[encoder] for grid in grids]) for encoder in grids[0]},
        )

    def _stacked(self, grids: list[TokenGrid]) -> TokenGrid:
        return TokenGrid.batch(grids).to(self.device)

    def _teachers(self, item: Item) -> dict[EncoderSpec, TokenGrid]:
        stored = {
            encoder: self.cache.read_features(item, encoder) for encoder in self.cache.features
        }
        if not self.online:
            return stored
        try:
            frames = self.source.frames(self.place[item.id])
        except ClipError as error:
            raise UserError(
                f"The clip {item.id!r} can no longer be read ({error}), and the teacher is online. "
                "Run `videorepa prepare` again, or set align.teacher to cached."
            ) from None
        video = to_video(frames)[None]
        return stored | {spec: encoder(video) for spec, encoder in self.online.items()}


def read_ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each read in a thread while the one before is trained on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


@dataclass(frozen=True)
class Batch:
    """All that one micro-batch needs, on the training device. teachers: features by encoder."""

    latents: Float[Tensor, "b f c h w"]
    text: Text
    noise: Float[Tensor, "b f c h w"]
    timestep: Num[Tensor, " b"]
    teachers: dict[EncoderSpec, TokenGrid]
