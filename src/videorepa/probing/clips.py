"""The clips that a scan or a probe measures on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8
from torch import Tensor

from videorepa.data.source import open_source
from videorepa.data.video import read_chosen, to_video
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
        """The slice of each batch."""
        starts = range(0, len(self.frames), self.batch)
        return [slice(start, start + self.batch) for start in starts]

    def video(self, which: slice) -> Float[Tensor, "b f 3 h w"]:
        """Some of the clips, with colours from 0 to 1."""
        return to_video(self.frames[which])


def first_readable_clips(recipe: Recipe, count: int) -> tuple[Clips, str, list[str]]:
    """Read the first `count` readable clips of the recipe's data.

    Returns:
        The clips, their digest, and notes on clips that were left out.

    Raises:
        UserError: Fewer than two clips can be read.
    """
    source = open_source(recipe.data)
    frames, captions, digests, notes = [], [], [], []
    for number, item in enumerate(source.items):
        if len(frames) == count:
            break
        try:
            digest = source.digest(number)
            frames.append(source.sample(number).frames)
        except ClipError as error:
            notes.append(f"The clip {item.id!r} was left out: {error}.")
            continue
        captions.append(item.caption)
        digests.append([item.id, item.caption, digest])
    if len(frames) < 2:
        raise UserError(
            f"{len(frames)} of {len(source.items)} clips can be read; a scan needs 2 or more. "
            + " ".join(notes)
        )
    if len(frames) < count:
        notes.append(
            f"Only {len(frames)} of the {count} clips that the scan should measure on can be read."
        )
    ids = [str(place) for place in range(len(frames))]
    clips = Clips(np.stack(frames), captions, ids, recipe.data.prepare_batch)
    return clips, json_digest(digests), notes


@dataclass(frozen=True)
class ShownFrames:
    """Reads those frames of each video that a probe shows.

    Attributes:
        size: Size to which frames are resized.
        numbers: Numbers of the frames shown, by scenario.
        batch: How many clips go through a model at once.
    """

    size: ClipSize
    numbers: Mapping[str, Sequence[int]]
    batch: int

    def read(self, chunk: Sequence[Stimulus]) -> tuple[Clips | None, dict[str, str]]:
        """Read videos.

        Returns:
            The clips that can be read, or None without any, and why others cannot be, by id.
        """
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
