"""Videos and captions to a cache of latents, text embeddings and teacher features."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from videorepa.data.cache import Cache
from videorepa.data.source import open_source
from videorepa.device import pick_device, resolve_precision
from videorepa.errors import ClipError, UserError
from videorepa.progress import track
from videorepa.recipe import Recipe


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
    Teacher features are stored where the recipe's `align.teacher` is "cached".
    A clip that cannot be used costs that clip alone: it is in the result and in the cache's
    `failures`. Raises UserError for a cache of other models or other content.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"The shard {index}/{count} does not exist; give i/n with 0 <= i < n.")
    recipe.backbone.check_clip(recipe.data)
    if recipe.encoder is not None:
        recipe.encoder.shape(recipe.data.frames)
    source = open_source(recipe.data)
    cache = Cache(recipe, create=True)
    where = pick_device(device)
    dtype = resolve_precision(recipe.train.precision, where)

    mine = range(index, len(source.items), count)
    failed: dict[str, str] = {}
    todo: list[tuple[int, str]] = []
    for number in mine:
        item = source.items[number]
        try:
            digest = source.digest(number)
        except ClipError as error:
            failed[item.id] = str(error)
            cache.note_failure(item, str(error))
            continue
        done = cache.has_clip(item, digest) and (not recipe.stores_features or cache.has_features(item))
        if not done:
            todo.append((number, digest))
    found = len(mine) - len(todo) - len(failed)
    if not todo:
        return Prepared(0, found, failed)

    backbone = recipe.backbone.load(("vae", "text_encoder"), where, dtype)
    encoder = recipe.encoder.load(where, dtype) if recipe.stores_features else None
    cache.write_empty_caption(backbone.encode_text([""])[0])
    made = 0
    for number, digest in track(todo, "prepare", done=len(mine) - len(todo)):
        item = source.items[number]
        try:
            frames = source.frames(number)
        except ClipError as error:
            failed[item.id] = str(error)
            cache.note_failure(item, str(error))
            continue
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255.0
        if encoder is not None and not cache.has_features(item):
            cache.write_features(item, encoder(video))
        if not cache.has_clip(item, digest):
            moments, text = backbone.encode_video(video), backbone.encode_text([item.caption])
            if not (moments.isfinite().all() and text.isfinite().all()):
                raise UserError(
                    f"The clip {item.id!r} gives latents or text embeddings that are not finite. "
                    "The weights are damaged, or the precision is too low: try "
                    "--train.precision float32."
                )
            cache.write_clip(item, digest, moments[0], text[0])
        cache.clear_failure(item)
        made += 1
    return Prepared(made, found, failed)
