"""Videos and captions to a cache of latents, text embeddings and teacher features."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from videorepa.align.contract import check
from videorepa.backbones import Text
from videorepa.data.cache import Cache
from videorepa.data.source import open_source
from videorepa.data.video import to_video
from videorepa.errors import ClipError, UserError
from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.progress import track


@dataclass(frozen=True)
class Prepared:
    """What `prepare` did: clips made now, found done, and failed, each with its reason."""

    made: int
    found: int
    failed: dict[str, str] = field(default_factory=dict)


def prepare(
    recipe: Recipe,
    *,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
) -> Prepared:
    """Fill the recipe's cache; what is there already is kept.

    shard: (i, n) does every n-th clip from the i-th, so that n processes share the work.
    Features of the encoders whose `align.teacher` is "cached" are stored as well.
    A clip that cannot be used costs that clip alone: it is in the result and in the cache's
    `failures`. Raises UserError for a cache of other models or other content.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"The shard {index}/{count} does not exist; give i/n with 0 <= i < n.")
    check(recipe)  # Refuses what cannot work, before anything is made.
    source = open_source(recipe.data)
    cache = Cache(recipe, create=True)
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)

    # Chunks are always the same clips: what a clip becomes must not depend on interruptions.
    size = recipe.data.prepare_batch
    chunks = [
        range(first, min(first + size, len(source.items)))
        for first in range(0, len(source.items), size)
    ][index::count]
    failed: dict[str, str] = {}
    todo: list[list[tuple[int, str]]] = []
    found = 0

    def fail(number: int, error: ClipError) -> None:
        failed[source.items[number].id] = str(error)
        cache.note_failure(source.items[number], str(error))

    def is_done(number: int, digest: str) -> bool:
        item = source.items[number]
        return cache.has_clip(item, digest) and cache.has_features(item)

    for chunk in chunks:
        readable: list[tuple[int, str]] = []
        for number in chunk:
            try:
                readable.append((number, source.digest(number)))
            except ClipError as error:
                fail(number, error)
        done = [number for number, digest in readable if is_done(number, digest)]
        for number in done:
            cache.clear_failure(source.items[number])
        found += len(done)
        if len(done) < len(readable):
            todo.append(readable)
    if not todo and (cache.has_empty_caption() or not found):
        return Prepared(0, found, failed)

    backbone = recipe.backbone.preparing.load(("vae", "text_encoder"), where, dtype)
    encoders = {spec: spec.load(where, dtype) for spec in recipe.stored_encoders}
    cache.write_empty_caption(_one(backbone.encode_text([""]), 0))
    made = 0
    for chunk in track(todo, "prepare", total=len(chunks), done=len(chunks) - len(todo)):
        clips: list[tuple[int, str]] = []
        frames: list[np.ndarray] = []
        for number, digest in chunk:
            try:
                frames.append(source.frames(number))
                clips.append((number, digest))
            except ClipError as error:
                fail(number, error)
        if not clips:
            continue
        items = [source.items[number] for number, _ in clips]
        video = to_video(np.stack(frames))
        moments = backbone.encode_video(video)
        texts = backbone.encode_text([item.caption for item in items])
        features = {spec: encoder(video) for spec, encoder in encoders.items()}
        for place, (number, digest) in enumerate(clips):
            item, text = items[place], _one(texts, place)
            if not all(tensor.isfinite().all() for tensor in (moments[place], *text.values())):
                raise UserError(
                    f"The clip {item.id!r} gives latents or text embeddings that are not finite. "
                    "The weights are damaged, or the precision is too low: try "
                    "--train.precision float32."
                )
            if is_done(number, digest):
                continue
            for spec, grid in features.items():
                cache.write_features(item, spec, grid.sample(place))
            cache.write_clip(item, digest, moments[place], text)
            cache.clear_failure(item)
            made += 1
    return Prepared(made, found, failed)


def _one(texts: Text, place: int) -> Text:
    return {name: tensor[place] for name, tensor in texts.items()}
