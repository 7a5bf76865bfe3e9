"""The clips that a scan or a probe measures on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float
from torch import Tensor

from videorepa.data.source import open_source
from videorepa.data.video import read_chosen, to_video
from videorepa.errors import ClipError, UserError
from videorepa.probing.physion import Stimulus
from videorepa.recipe import Recipe
from videorepa.settings.sections import ClipSize
from videorepa.system.fingerprint import json_digest
from videorepa.world.contact import contact_clip
from videorepa.world.simulator import VERSION as LAB_VERSION


def readable_clips(recipe: Recipe, count: int) -> tuple[Clips, list[str]]:
    source = open_source(recipe.data)
    frames, captions, digests, notes = [], [], [], []
    for number, item in enumerate(source.items):
        if len(frames) == count:
            break
        try:
            digest = source.digest(number)
            frames.append(source.frames(number))
        except ClipError as error:
            notes.append(f"The clip {item.id!r} was left out: {error}.")
            continue
        captions.append(item.caption)
        digests.append([item.id, item.caption, digest])
    if len(frames) < 2:
        raise UserError(
            f"{len(frames)} of {len(source.items)} clips can be read; a scan wants 2 or more. "
            + " ".join(notes)
        )
    if len(frames) < count:
        notes.append(f"There are {len(frames)} clips to measure on, where {count} were asked for.")
    batch = recipe.data.prepare_batch
    return Clips(np.stack(frames), captions, json_digest(digests), batch), notes


def contact_clips(recipe: Recipe, count: int) -> Clips:
    drawn = [contact_clip(recipe.seed, index) for index in range(count)]
    return Clips(
        frames=np.stack([clip.frames for clip, _ in drawn]),
        captions=[""] * count,
        digest=f"lab {LAB_VERSION}, seed {recipe.seed}, {count} clips",
        batch=recipe.data.prepare_batch,
        label=np.array([touches for _, touches in drawn]),
    )


# Features, kept as they come.


@dataclass(frozen=True)
class ShownFrames:
    """What of a clip is shown. shown: numbers of frames by scenario. batch: clips that go through a
    model at once. seed: of latents and noise."""

    size: ClipSize
    shown: Mapping[str, Sequence[int]]
    batch: int
    seed: int

    def read(self, chunk: Sequence[Stimulus]) -> tuple[Clips | None, list[str], dict[str, str]]:
        """The clips that can be read, their ids, and why others cannot."""
        frames, ids, failed = [], [], {}
        for stimulus in chunk:
            try:
                numbers = self.shown[stimulus.scenario]
                frames.append(
                    read_chosen(stimulus.path, numbers, self.size.height, self.size.width)
                )
                ids.append(stimulus.id)
            except ClipError as error:
                failed[stimulus.id] = str(error)
        clips = Clips(np.stack(frames), [""] * len(ids), "", self.batch) if ids else None
        return clips, ids, failed


@dataclass(frozen=True)
class Clips:
    """Clips in memory.

    frames: (n, F, H, W, 3) uint8. digest: changes when the clips do. batch: how many go through a
    model at once. label: what the probe is to read.
    """

    frames: np.ndarray
    captions: Sequence[str]
    digest: str
    batch: int
    label: Bool[np.ndarray, " n"] | None = None

    def batches(self) -> list[slice]:
        count = len(self.frames)
        return [slice(first, first + self.batch) for first in range(0, count, self.batch)]

    def video(self, which: slice) -> Float[Tensor, "b f 3 h w"]:
        return to_video(self.frames[which])
