"""The blocks of a base model: their outputs for noisy clips, and how close they are to teachers."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.align.taps import tap
from videorepa.backbones import Backbone, Text, moved, timestep_of_noise
from videorepa.conditioning import Opening
from videorepa.probing.clips import Clips
from videorepa.probing.closeness import closeness, mean_over_clips, next_clips
from videorepa.probing.records import Measurement
from videorepa.system.progress import track
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid


@dataclass(frozen=True)
class EncodedClips:
    """Clips as the base model's inputs.

    Attributes:
        latents: For each clip, (f, c, h, w).
        noise: For each clip, (f, c, h, w).
        text: For each clip, its encoded caption, which may be in main memory.
        openings: For each clip, what a model that has no text mode is shown of it: its first
            frame. Empty for others.
    """

    clips: Clips
    latents: list[Tensor]
    noise: list[Tensor]
    text: list[Text]
    openings: list[Opening]


def encode(backbone: Backbone, clips: Clips, seed: int) -> EncodedClips:
    """Encode clips and captions, and draw the noise, which is the same at every noise level."""
    latents, openings = draw_latents(backbone, clips, seed, "scan latents", "encode")
    noise = draw_noise(latents, clips, seed, "scan noise")
    return EncodedClips(clips, latents, noise, encode_captions(backbone, clips), openings)


def encode_captions(backbone: Backbone, clips: Clips) -> list[Text]:
    """Encode each clip's caption, equal ones once where the text encoder does not see the clip.

    They are put into main memory, since one can take 100 MB.
    """
    cpu = torch.device("cpu")
    if backbone.spec.text_sees_image:
        ones = (slice(n, n + 1) for n in range(len(clips.captions)))
        seen = (backbone.encode_captions(clips.captions[n], clips.video(n)) for n in ones)
        return [moved(text, cpu) for text in seen]
    text = {caption: moved(backbone.encode_text([caption]), cpu) for caption in set(clips.captions)}
    return [text[caption] for caption in clips.captions]


def draw_latents(
    backbone: Backbone, clips: Clips, seed: int, purpose: str, what: str = ""
) -> tuple[list[Float[Tensor, "f c h w"]], list[Opening]]:
    """Draw a sample of each clip's posterior, by its id, and encode what `EncodedClips.openings`
    has.

    Args:
        purpose: Keeps draws of the same seed apart.
        what: Name of the progress bar; "" shows none.
    """
    latents: list[Tensor] = []
    openings: list[Opening] = []
    for which in track(clips.batches(), what, shown=bool(what)):
        videos = clips.video(which)
        for video, moments in zip(
            videos.split(1), backbone.encode_video(videos).split(1), strict=True
        ):
            draw = generator(seed, purpose, clips.ids[len(latents)])
            latents += backbone.latents(moments, draw)
            if (opening := backbone.opening(video, moments)) is not None:
                openings.append(opening)
    return latents, openings


def draw_noise(
    latents: Sequence[Tensor], clips: Clips, seed: int, purpose: str, *draw: int
) -> list[Tensor]:
    """Draw noise for each clip's latents, by its id."""
    return [
        torch.randn(x.shape, generator=generator(seed, purpose, clip, *draw)).to(x)
        for clip, x in zip(clips.ids, latents, strict=True)
    ]


class Blocks:
    """Some blocks of a base model whose transformer is loaded.

    Args:
        backbone: The live base model.
        blocks: Their numbers, counted from 1.
    """

    def __init__(self, backbone: Any, blocks: Sequence[int]) -> None:
        self.backbone, self.blocks = backbone, blocks

    def distances(
        self, encoded: EncodedClips, level: float, teachers: Mapping[str, TokenGrid]
    ) -> dict[str, list[Measurement]]:
        """Measure how close every block is to each teacher, and how its relations spread.

        Args:
            level: The noise's share of the noisy latents' variance, 0 to 1.
            teachers: Features of the same clips, by the teacher's name; without the first frame if
                the model is shown that.
        """
        values: dict[tuple[str, int, str], list[float]] = defaultdict(list)
        timestep = timestep_of_noise(self.backbone, level, encoded.latents[0])
        for which, block, grid in self.outputs(encoded, timestep, f"noise {level:g}"):
            if encoded.openings:
                grid = grid.since(1)
            for teacher, features in teachers.items():
                theirs = features.with_tokens(features.tokens[which])
                others = next_clips(features, which)
                for measure, of_clips in closeness(grid, theirs, others).items():
                    values[teacher, block, measure] += of_clips
        measurements: dict[str, list[Measurement]] = defaultdict(list)
        for (teacher, block, measure), of_clips in values.items():
            measurements[teacher].append(
                mean_over_clips(measure, of_clips, teacher, "block", block, level)
            )
        return measurements

    @torch.no_grad()
    def outputs(
        self, encoded: EncodedClips, timestep: Num[Tensor, " 1"], what: str = ""
    ) -> Iterator[tuple[slice, int, TokenGrid]]:
        """Yield each batch's slice, each block's number, and the block's output for the batch.

        The transformer runs once for each batch, with all blocks tapped. A tapped output is
        dropped once it has been yielded.

        Args:
            what: Name of the progress bar; "" shows none.
        """
        with ExitStack() as stack:
            taps = {n: stack.enter_context(tap(self.backbone.block(n))) for n in self.blocks}
            for which in track(encoded.clips.batches(), what, shown=bool(what)):
                latents = torch.stack(encoded.latents[which])
                noise = torch.stack(encoded.noise[which])
                captions = encoded.text[which]
                text = {name: torch.cat([t[name] for t in captions]) for name in captions[0]}
                text = moved(text, latents.device)
                at = timestep.expand(len(latents))
                shown = encoded.openings[which]
                opening = Opening.batch(shown) if shown else None
                _, inputs = self.backbone.noised(latents, text, noise, at, opening)
                self.backbone.transformer(**inputs, return_dict=False)
                for number, tapped in taps.items():
                    yield which, number, self.backbone.grid(tapped.take(), latents)
