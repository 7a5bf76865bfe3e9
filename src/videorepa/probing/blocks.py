"""What a forward pass tells of every block: how close it is to teachers, and what it knows of
contact."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.align.taps import tap
from videorepa.backbones import Backbone, Text
from videorepa.errors import UserError
from videorepa.probing.clips import Clips
from videorepa.probing.closeness import closeness
from videorepa.probing.records import Reading, contact_reading, mean_reading
from videorepa.system.progress import track
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid

TIMESTEPS_TRIED = 4096

LEVEL_TOLERANCE = 0.02

SLICES = 3
"""Steps in time whose tokens the probe reads, evenly spaced, as for VideoREPA's figure 1."""


@dataclass(frozen=True)
class Encoded:
    """Clips as the base model takes them: latents (f, c, h, w), noise alike, and what each
    caption became."""

    clips: Clips
    latents: list[Tensor]
    noise: list[Tensor]
    text: list[Text]


def slices(
    grid: TokenGrid, count: int = SLICES, side: int | None = None
) -> Float[np.ndarray, "b d"]:
    """The tokens of so many evenly spaced steps in time, of those that begin in the clip:
    CogVideoX's first step, which is frame 0 alone, is not among them.

    side: rows and columns that each frame's tokens are averaged to; by default all are given.
    """
    grid = grid.since(0)
    if side is not None:
        grid = grid.averaged(side)
    steps = np.linspace(0, grid.size[0] - 1, count).round().astype(int)
    return grid.tokens[:, steps].flatten(1).float().cpu().numpy()


# The base model.


def encode(backbone: Backbone, clips: Clips, seed: int) -> Encoded:
    """Latents and text of clips, and the noise for them, which is the same at every level."""
    latents = draw_latents(backbone, clips, lambda n: generator(seed, "scan latents", n), "encode")
    noise = draw_noise(latents, lambda n: generator(seed, "scan noise", n))
    text = {caption: backbone.encode_text([caption]) for caption in set(clips.captions)}
    return Encoded(clips, latents, noise, [text[caption] for caption in clips.captions])


def draw_latents(
    backbone: Backbone, clips: Clips, by: Callable[[int], torch.Generator], what: str = ""
) -> list[Tensor]:
    """A sample of each clip's posterior, (f, c, h, w), drawn by the clip's own generator.

    what: its progress is shown under that name; without one it is not.
    """
    latents: list[Tensor] = []
    for which in track(clips.batches(), what, shown=bool(what)):
        for moments in backbone.encode_video(clips.video(which)).split(1):
            latents += backbone.latents(moments, by(len(latents)))
    return latents


def draw_noise(latents: Sequence[Tensor], by: Callable[[int], torch.Generator]) -> list[Tensor]:
    """Noise for each clip's latents, drawn by the clip's own generator."""
    return [torch.randn(x.shape, generator=by(number)).to(x) for number, x in enumerate(latents)]


class Blocks:
    """A base model whose transformer is loaded, and the blocks of it that are measured."""

    def __init__(self, backbone: Any, blocks: Sequence[int]) -> None:
        self.backbone, self.blocks = backbone, blocks

    def distances(
        self, encoded: Encoded, level: float, teachers: Mapping[str, TokenGrid]
    ) -> dict[str, list[Reading]]:
        """Relation error and CKA of every block, for every teacher's features of these clips."""
        found: dict[tuple[str, int, str], list[float]] = defaultdict(list)
        for which, block, grid in self._at_level(encoded, level):
            for name, features in teachers.items():
                theirs = features.with_tokens(features.tokens[which])
                for measure, values in closeness(grid, theirs).items():
                    found[name, block, measure] += values
        readings: dict[str, list[Reading]] = defaultdict(list)
        for (name, block, measure), values in found.items():
            readings[name].append(mean_reading(measure, values, "block", block, level))
        return readings

    def contact(self, encoded: Encoded, level: float) -> list[Reading]:
        """How well contact is read from every block."""
        found: dict[int, list[np.ndarray]] = defaultdict(list)
        for _, block, grid in self._at_level(encoded, level):
            found[block].append(slices(grid))
        return [
            contact_reading(np.concatenate(rows), encoded.clips, "block", block, level)
            for block, rows in found.items()
        ]

    def _at_level(self, encoded: Encoded, level: float) -> Iterator[tuple[slice, int, TokenGrid]]:
        return self.outputs(encoded, self._timestep(level, encoded.latents[0]), f"noise {level:g}")

    @torch.no_grad()
    def outputs(
        self, encoded: Encoded, timestep: Num[Tensor, " 1"], what: str = ""
    ) -> Iterator[tuple[slice, int, TokenGrid]]:
        """Which clips, a block's number and its grid of them: one pass per batch of clips, with all
        blocks tapped; what is taken is let go at once.

        what: its progress is shown under that name; without one it is not.
        """
        with ExitStack() as stack:
            taps = {n: stack.enter_context(tap(self.backbone.block(n))) for n in self.blocks}
            for which in track(encoded.clips.batches(), what, shown=bool(what)):
                latents = torch.stack(encoded.latents[which])
                noise = torch.stack(encoded.noise[which])
                captions = encoded.text[which]
                text = {name: torch.cat([t[name] for t in captions]) for name in captions[0]}
                at = timestep.expand(len(latents))
                noisy = self.backbone.diffusion.add_noise(latents, noise, at)
                inputs = self.backbone.inputs(noisy, text, at)
                self.backbone.transformer(**inputs, return_dict=False)
                for number, tapped in taps.items():
                    yield which, number, self.backbone.grid(tapped.take(), latents)

    def _timestep(self, level: float, latents: Float[Tensor, "f c h w"]) -> Num[Tensor, " 1"]:
        """The timestep at which the noise's share of the variance is nearest to the level.

        Found by noising zeros and ones, so that it holds for any kind of diffusion.
        """
        many = latents.expand(TIMESTEPS_TRIED, *latents.shape)
        drawn = self.backbone.sample_timesteps(many, generator(0, "scan timesteps")).unique()
        one = torch.ones(len(drawn), 1, device=drawn.device)
        add_noise = self.backbone.diffusion.add_noise
        signal, spread = add_noise(one, 0 * one, drawn), add_noise(0 * one, one, drawn)
        share = (spread**2 / (signal**2 + spread**2))[:, 0]
        best = (share - level).abs().argmin()
        if abs(share[best] - level) > LEVEL_TOLERANCE:
            raise UserError(
                f"The base model is never at the noise level {level:g}; the nearest is "
                f"{share[best]:.3f}, of {share.min():.3f} to {share.max():.3f}."
            )
        return drawn[best][None]
