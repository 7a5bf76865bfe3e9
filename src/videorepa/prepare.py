"""Turns videos and captions into a cache of latents, text embeddings and teacher features."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import torch

from videorepa.align.contract import check
from videorepa.backbones import Backbone, Part
from videorepa.data.cache import Cache, Lacks, Record
from videorepa.data.digests import Digests
from videorepa.data.sampling import Sampling, sampling_notes
from videorepa.data.source import ClipSource, SourceClip, open_source
from videorepa.data.video import Sampled, to_video
from videorepa.encoders import Encoder, EncoderSpec
from videorepa.errors import ClipError, within_memory
from videorepa.recipe import Recipe
from videorepa.remedies import in_encoding
from videorepa.system.background import ahead, behind
from videorepa.system.checks import check_shard
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.progress import console, track
from videorepa.system.randomness import generator
from videorepa.system.wording import count

KEEP_SECONDS = 60.0
"""How often digests are written down, so that a killed process loses no more of that work."""

READERS = min(4, os.cpu_count() or 1)
"""Videos that are read at a time, while the clips before them are encoded."""

UNWRITTEN = 8
"""Most writes that wait while clips are encoded. What they hold is still on the device."""

Fail = Callable[[SourceClip, ClipError], None]
"""Notes that a clip cannot be used, and why."""

Read = TypeVar("Read")
"""What is read of a clip."""

Later = Callable[..., None]
"""Calls a function with arguments in the background, in the order in which it is given them."""


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did.

    Attributes:
      made: How many clips were encoded now, at least in part.
      complete: How many clips were complete before.
      failed: Why a clip cannot be used, by its id.
    """

    made: int
    complete: int
    failed: dict[str, str] = field(default_factory=dict)


@dataclass
class _ClipWork:
    """A usable clip of the source, and the parts of it that have to be made.

    Attributes:
      number: The clip's index in the source.
      source: The digest of its content; that of the record where its video is gone.
      record: What the clip in the cache was made from, or None while it is not there.
      lacks: Why parts have to be made.
    """

    number: int
    clip: SourceClip
    source: str
    record: Record | None
    lacks: Lacks


def prepare(
    recipe: Recipe,
    *,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
) -> Prepared:
    """Fill the recipe's cache with the parts that it lacks.

    A clip's parts are its latents, its caption's text embeddings, the features of each encoder
    whose `align.teacher` is "cached", and its first frame encoded alone where the model is shown
    it so. Parts whose video or caption has changed are made again. Only
    the models that make missing parts are loaded. A clip that cannot be used is reported in the
    result and in the cache's `failures`, and the others are still prepared.

    Args:
      recipe: Names the clips, the models and the cache.
      shard: (i, n) prepares every n-th chunk of clips from the i-th, so that n processes share the
        work.
      device: Where the models run; by default the first GPU, or the CPU.

    Raises:
      UserError: The cache was made with other models or in another precision, or the recipe
        cannot work.
    """
    check_shard(shard)
    check(recipe)  # Refuses what cannot work, before anything is made.
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)
    source = open_source(recipe.data)
    cache = Cache(recipe, encoded_in=dtype)
    failed: dict[str, str] = {}

    def fail(clip: SourceClip, error: ClipError) -> None:
        failed[clip.id] = str(error)
        cache.note_failure(clip, str(error))

    # A chunk always has the same clips and is encoded whole, even if it lacks only one part: a
    # clip's bits depend on the others in its batch, and must not depend on interruptions.
    size, (index, shards) = recipe.data.prepare_batch, shard
    starts = range(0, len(source.items), size)[index::shards]
    chunks = _look_up(source, cache, [range(len(source.items))[s : s + size] for s in starts], fail)
    todo = [chunk for chunk in chunks if any(work.lacks for work in chunk)]
    complete = sum(not work.lacks for chunk in chunks for work in chunk)
    made = 0
    if todo or (complete and not cache.has_empty_caption()):
        with within_memory(in_encoding(recipe)):
            with behind(UNWRITTEN) as later:
                _encode_captions(recipe, cache, source, todo, where, dtype, later, fail)
            # Text encoders that see first frames have met videos that cannot be read.
            todo = [[work for work in chunk if work.clip.id not in failed] for chunk in todo]
            lacking = [work.lacks for chunk in todo for work in chunk]
            backbone, encoders = _load(recipe, lacking, where, dtype)
            with (
                behind(UNWRITTEN) as later,
                closing(_read(source.sample, todo, size, fail, _lacks_frames)) as chunks_read,
            ):
                progress = track(chunks_read, "prepare", len(starts), len(starts) - len(todo))
                for works, sampled in progress:
                    if sampled:
                        _encode(cache, works, sampled, backbone, encoders, where, later)
                    for work in works:
                        if work.lacks:
                            made += 1
                            later(cache.clear_failure, work.clip)
    usable = [work for chunk in chunks for work in chunk if work.clip.id not in failed]
    _say({work.clip.id: work.record for work in usable if work.record}, recipe)
    return Prepared(made, complete, failed)


def _encode_captions(
    recipe: Recipe,
    cache: Cache,
    source: ClipSource,
    chunks: Sequence[Sequence[_ClipWork]],
    where: torch.device,
    dtype: torch.dtype,
    later: Later,
    fail: Fail,
) -> None:
    """Make the text that clips and the empty caption lack, and drop the text encoders.

    Where latents lack too, the text waits for them in the cache.
    """
    todo = [chunk for chunk in chunks if any(_lacks_caption(cache, work) for work in chunk)]
    if not todo and cache.has_empty_caption():
        return
    backbone = recipe.backbone.preparing.load(("text_encoder",), where, dtype)
    sees_image, size = backbone.spec.text_sees_image, recipe.data.prepare_batch
    if not cache.has_empty_caption():
        cache.write_empty_caption(_one(backbone.encode_text([""]), 0))
    with closing(_read(source.first, todo, size, fail, lambda _: sees_image)) as chunks_read:
        for chunk, frames in track(chunks_read, "encode captions", len(todo)):
            captions = [work.clip.caption for work in chunk]
            if not captions:
                continue
            if sees_image:
                images = to_video(np.stack(frames))
                texts = backbone.encode_text_of(captions, images)
            else:
                texts = backbone.encode_text(captions)
            tokens = backbone.count_tokens(captions)
            for row, work in enumerate(chunk):
                if not _lacks_caption(cache, work):
                    continue
                clip, before = work.clip, work.record
                if work.lacks.latents:
                    later(cache.keep_caption, clip, work.source, tokens[row], _one(texts, row))
                else:
                    assert before is not None  # Its caption alone has changed.
                    work.record = replace(before, caption=clip.caption, tokens=tokens[row])
                    latents, _ = cache.read_clip(clip)
                    later(cache.write_clip, work.record, latents, _one(texts, row))


def _lacks_frames(work: _ClipWork) -> bool:
    return bool(work.lacks.latents or work.lacks.features or work.lacks.image)


def _lacks_caption(cache: Cache, work: _ClipWork) -> bool:
    is_kept = work.lacks.latents and cache.has_caption(work.clip, work.source)
    return bool(work.lacks.text) and not is_kept


def _load(
    recipe: Recipe,
    lacking: Sequence[Lacks],
    where: torch.device,
    dtype: torch.dtype,
) -> tuple[Backbone | None, dict[EncoderSpec, Encoder]]:
    """Load the models that make the latents, images and features that lack."""
    encoders = {
        spec: spec.load(where, dtype)
        for spec in recipe.stored_encoders
        if any(spec in lacks.features for lacks in lacking)
    }
    backbone = None
    if any(lacks.latents or lacks.image for lacks in lacking):
        parts: tuple[Part, ...] = ("vae",)
        if any(lacks.image for lacks in lacking):
            parts = ("vae", "image_encoder")
        backbone = recipe.backbone.preparing.load(parts, where, dtype)
    return backbone, encoders


def _read(
    read: Callable[[int], Read],
    chunks: Sequence[Sequence[_ClipWork]],
    size: int,
    fail: Fail,
    wants: Callable[[_ClipWork], bool],
) -> Generator[tuple[Sequence[_ClipWork], list[Read]]]:
    """Read the videos of chunks, the next ones' while the caller works on one.

    Args:
      read: Reads a clip of the source, or its first frame alone.
      chunks: What lacks.
      size: Clips in a chunk, as many of which are read ahead.
      fail: Is told of clips that lack something and cannot be read. They are left out, as are
        those that are complete and whose videos are gone.
      wants: Whether a clip's frames are needed. Those of all in its chunk are read then.

    Yields:
      The usable clips of each chunk, and what was read of them: [] for a chunk that needs none.
    """

    def sample(work: _ClipWork) -> Read | ClipError:
        try:
            return read(work.number)
        except ClipError as error:
            return error

    def wants_video(chunk: Sequence[_ClipWork]) -> bool:
        return any(wants(work) for work in chunk)

    wanted = (work for chunk in chunks if wants_video(chunk) for work in chunk)
    with closing(ahead(sample, wanted, READERS, most=size + READERS)) as results:
        for chunk in chunks:
            if not wants_video(chunk):
                yield chunk, []
                continue
            works: list[_ClipWork] = []
            sampled: list[Read] = []
            for work in chunk:
                result = next(results)
                if not isinstance(result, ClipError):
                    works.append(work)
                    sampled.append(result)
                elif work.lacks:
                    fail(work.clip, result)
            yield works, sampled


def _encode(
    cache: Cache,
    works: Sequence[_ClipWork],
    sampled: Sequence[Sampled],
    backbone: Backbone | None,
    encoders: Mapping[EncoderSpec, Encoder],
    where: torch.device,
    later: Later,
) -> None:
    """Make the latents and features that a chunk lacks, and let them be written later."""
    # As bytes, which are a quarter of the floats that they become there.
    video = to_video(torch.stack([torch.from_numpy(clip.frames).to(where) for clip in sampled]))
    for spec, encoder in encoders.items():
        if any(spec in work.lacks.features for work in works):
            grid = encoder.see(video, [clip.scene for clip in sampled])
            for row, work in enumerate(works):
                if spec in work.lacks.features:
                    later(cache.write_features, work.clip, work.source, spec, grid.sample(row))
    if backbone is None:
        return
    if any(work.lacks.image for work in works):
        # Caches can be shared by recipes of all seeds, so the draws depend on the clips alone.
        draws = [generator(0, "image noise", work.clip.id) for work in works]
        images = backbone.encode_image(video, draws)
        for row, work in enumerate(works):
            if work.lacks.image:
                later(cache.write_image, work.clip, work.source, _one(images, row))
    if any(work.lacks.latents for work in works):
        latents = backbone.encode_video(video)
        for row, work in enumerate(works):
            if work.lacks.latents:
                later(_write_clip, cache, work, sampled[row].sampling, latents[row])


def _write_clip(cache: Cache, work: _ClipWork, sampling: Sampling, moments: torch.Tensor) -> None:
    clip = work.clip
    tokens, text = cache.read_caption(clip)
    work.record = Record(clip.id, clip.caption, work.source, tokens, sampling)
    cache.write_clip(work.record, moments, text)


def _say(records: Mapping[str, Record], recipe: Recipe) -> None:
    """Print what a user should know of the clips in the cache, by their ids."""
    backbone = recipe.backbone.preparing
    tokens = {name: record.tokens for name, record in records.items()}
    samplings = {name: record.sampling for name, record in records.items()}
    notes = sampling_notes(samplings, recipe.data.frames, recipe.backbone.told_fps)
    for note in filter(None, [*notes, backbone.cut_note("captions", tokens)]):
        console.print(note)


def _look_up(
    source: ClipSource, cache: Cache, chunks: Sequence[range], fail: Fail
) -> list[list[_ClipWork]]:
    """See which parts the cache lacks of the usable clips in chunks of the source: of those that
    can be read, and of those that are complete."""
    works: list[list[_ClipWork]] = []
    changed: dict[str, str] = {}
    digests = Digests(source, cache.digests)
    try:
        for numbers in track(chunks, "check the clips"):
            works.append([])
            for number in numbers:
                clip = source.items[number]
                try:
                    digest = digests.of(number)
                except ClipError as error:
                    # What was made from a video that is gone cannot be another's.
                    record, lacks = cache.look_up(clip, None)
                    if record is None or lacks:
                        fail(clip, error)
                        continue
                    digest = record.source
                else:
                    record, lacks = cache.look_up(clip, digest)
                works[-1].append(_ClipWork(number, clip, digest, record, lacks))
                if not lacks:
                    cache.clear_failure(clip)
                elif record and lacks.text:
                    changed[clip.id] = lacks.text
            digests.keep(every=KEEP_SECONDS)
    finally:
        digests.keep()
    if changed:
        name, reason = next(iter(changed.items()))
        console.print(
            f"{count(len(changed), 'clip')} changed and will be made again. The first is {name!r}: "
            f"{reason}.",
        )
    return works


def _one(tensors: Mapping[str, torch.Tensor], row: int) -> dict[str, torch.Tensor]:
    return {name: tensor[row] for name, tensor in tensors.items()}
