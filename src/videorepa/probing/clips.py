"""The clips that a scan or a probe measures on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from videorepa.data.source import open_source
from videorepa.data.video import read_chosen
from videorepa.errors import ClipError, UserError
from videorepa.probing.physion import Stimulus
from videorepa.recipe import Recipe
from videorepa.settings.sections import ClipSize
from videorepa.system.fingerprint import json_digest


@dataclass(frozen=True)
class Clips:
    """Clips in memory.

    Attributes:
        frames: Colours from 0 to 255.
        captions: One for each clip.
        ids: One for each clip, by which noise is drawn.
        batch: How many clips go through a model at once.
    """

    frames: UInt8[np.ndarray, "n f h w 3"]
    captions: Sequence[str]
    ids: Sequence[str]
    batch: int

    def batches(self) -> list[slice]:
        """Where each batch lies."""
        count = len(self.frames)
        return [slice(first, first + self.batch) for first in range(0, count, self.batch)]

    def video(self, which: slice) -> Float[Tensor, "b f 3 h w"]:
        """Some of the clips, with colours from 0 to 1."""
        return torch.from_numpy(self.frames[which]).permute(0, 1, 4, 2, 3).float() / 255.0


def readable_clips(recipe: Recipe, count: int) -> tuple[Clips, str, list[str]]:
    """The first `count` clips of the recipe's data that can be read, their digest, and notes on
    the others.

    Raises:
        UserError: Fewer than two can be read.
    """
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
    ids = [str(place) for place in range(len(frames))]
    clips = Clips(np.stack(frames), captions, ids, recipe.data.prepare_batch)
    return clips, json_digest(digests), notes


@dataclass(frozen=True)
class ShownFrames:
    """Reads of each video the frames that a probe shows.

    Attributes:
        size: What each clip is brought to.
        numbers: Numbers of the frames shown, by scenario.
        batch: How many clips go through a model at once.
    """

    size: ClipSize
    numbers: Mapping[str, Sequence[int]]
    batch: int

    def read(self, chunk: Sequence[Stimulus]) -> tuple[Clips | None, dict[str, str]]:
        """The clips that can be read, None if there are none, and by id why others cannot be."""
        frames, ids, failures = [], [], {}
        for stimulus in chunk:
            numbers = self.numbers[stimulus.scenario]
            try:
                frames.append(
                    read_chosen(stimulus.path, numbers, self.size.height, self.size.width)
                )
                ids.append(stimulus.id)
            except ClipError as error:
                failures[stimulus.id] = str(error)
        clips = Clips(np.stack(frames), [""] * len(ids), ids, self.batch) if ids else None
        return clips, failures
