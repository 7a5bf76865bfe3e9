"""Turns videos and captions into a cache of latents, text embeddings and teacher features."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from videorepa.align.contract import check
from videorepa.backbones import Part, Text
from videorepa.data.cache import Cache
from videorepa.data.source import SourceClip, open_source
from videorepa.data.video import to_video
from videorepa.encoders import EncoderSpec
from videorepa.errors import ClipError
from videorepa.recipe import Recipe
from videorepa.system.checks import check_finite, check_shard
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.progress import track


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


@dataclass(frozen=True)
class _ClipWork:
    """A readable clip of the source, and the parts of it that the cache lacks.

    Attributes:
      number: The clip's index in the source.
    """

    number: int
    item: SourceClip
    digest: str
    lacks_latents: bool
    lacks_features: tuple[EncoderSpec, ...]

    @property
    def is_complete(self) -> bool:
        return not (self.lacks_latents or self.lacks_features)


def prepare(
    recipe: Recipe,
    *,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
) -> Prepared:
    """Fill the recipe's cache with the parts that it lacks.

    A clip's parts are its latents with its text embeddings, and the features of each encoder whose
    `align.teacher` is "cached". Only the models that make missing parts are loaded. A clip that
    cannot be used is reported in the result and in the cache's `failures`, and the others are
    still prepared.

    Args:
      recipe: Names the clips, the models and the cache.
      shard: (i, n) prepares every n-th chunk of clips from the i-th, so that n processes share the
        work.
      device: Where the models run; by default the first GPU, or the CPU.

    Raises:
      UserError: The cache was made with other models or from other clips, or the recipe cannot
        work.
    """
    check_shard(shard)
    check(recipe)  # Refuses what cannot work, before anything is made.
    source = open_source(recipe.data)
    cache = Cache(recipe, create=True)
    failed: dict[str, str] = {}

    def fail(item: SourceClip, error: ClipError) -> None:
        failed[item.id] = str(error)
        cache.note_failure(item, str(error))

    # A chunk always has the same clips and is encoded whole, even if it lacks only one part: a
    # clip's bits depend on the others in its batch, and must not depend on interruptions.
    size, (index, count) = recipe.data.prepare_batch, shard
    starts = range(0, len(source.items), size)[index::count]
    todo: list[list[_ClipWork]] = []
    complete = 0
    for start in starts:
        chunk: list[_ClipWork] = []
        for number, item in enumerate(source.items[start : start + size], start):
            try:
                chunk.append(_look_up(cache, number, item, source.digest(number)))
            except ClipError as error:
                fail(item, error)
        for clip in chunk:
            if clip.is_complete:
                complete += 1
                cache.clear_failure(clip.item)
        if not all(clip.is_complete for clip in chunk):
            todo.append(chunk)
    if not todo and (cache.has_empty_caption() or not complete):
        return Prepared(0, complete, failed)

    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)
    lacking = [clip for chunk in todo for clip in chunk]
    encoders = {
        spec: spec.load(where, dtype)
        for spec in recipe.stored_encoders
        if any(spec in clip.lacks_features for clip in lacking)
    }
    parts: tuple[Part, ...] = ()
    if any(clip.lacks_latents for clip in lacking):
        parts = ("vae", "text_encoder")
    elif not cache.has_empty_caption():
        parts = ("text_encoder",)
    backbone = recipe.backbone.preparing.load(parts, where, dtype) if parts else None
    if backbone is not None and not cache.has_empty_caption():
        cache.write_empty_caption(_one(backbone.encode_text([""]), 0))

    made = 0
    for chunk in track(todo, "prepare", total=len(starts), done=len(starts) - len(todo)):
        clips: list[_ClipWork] = []
        frames: list[np.ndarray] = []
        for clip in chunk:
            try:
                frames.append(source.frames(clip.number))
                clips.append(clip)
            except ClipError as error:
                fail(clip.item, error)
        if not clips:
            continue
        video = to_video(np.stack(frames))
        # Features come first: a clip whose latents are there has had its content checked.
        for spec, encoder in encoders.items():
            if any(spec in clip.lacks_features for clip in clips):
                grid = encoder(video)
                for row, clip in enumerate(clips):
                    if spec in clip.lacks_features:
                        features = grid.sample(row)
                        what = f"The features that {spec.name} gives of the clip {clip.item.id!r}"
                        check_finite(what, features.tokens)
                        cache.write_features(clip.item, spec, features)
        if backbone is not None and any(clip.lacks_latents for clip in clips):
            moments = backbone.encode_video(video)
            texts = backbone.encode_text([clip.item.caption for clip in clips])
            for row, clip in enumerate(clips):
                text = _one(texts, row)
                what = f"The latents or text embeddings of the clip {clip.item.id!r}"
                check_finite(what, moments[row], *text.values())
                if clip.lacks_latents:
                    cache.write_clip(clip.item, clip.digest, moments[row], text)
        for clip in clips:
            if not clip.is_complete:
                made += 1
                cache.clear_failure(clip.item)
    return Prepared(made, complete, failed)


def _look_up(cache: Cache, number: int, item: SourceClip, digest: str) -> _ClipWork:
    """See which parts of a clip the cache lacks.

    Only the file of the latents records the content that it was made from. Without it nobody can
    tell whether the features are of the same content, so they are made again.
    """
    lacks_latents = not cache.has_clip(item, digest)
    lacks_features = tuple(
        encoder
        for encoder in cache.features
        if lacks_latents or not cache.has_features(item, encoder)
    )
    return _ClipWork(number, item, digest, lacks_latents, lacks_features)


def _one(texts: Text, row: int) -> Text:
    return {name: tensor[row] for name, tensor in texts.items()}
