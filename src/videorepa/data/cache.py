"""The cache: latents, text embeddings and teacher features, one file per clip.

A file per clip, not a table: each is written whole or not at all, so a killed process costs the
clip it was at, any number of processes can share the work, and bfloat16 is stored as it is.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from videorepa.backbones import Text
from videorepa.data.source import CaptionedClip
from videorepa.encoders import EncoderSpec
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.system.files import (
    atomic_write,
    from_metadata,
    is_vacant,
    read_text,
    sweep,
    to_metadata,
)
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid

FORMAT = 2

EMPTY_CAPTION = "empty-caption.safetensors"

TEXT = "text."


def quantised(tokens: Float[Tensor, "*n d"]) -> tuple[Int8[Tensor, "*n d"], Float[Tensor, "*n"]]:
    """Tokens in 8 bits, each with a scale of its own: its largest channel becomes 127."""
    tokens = tokens.float()
    scale = tokens.abs().amax(-1) / 127
    steps = tokens / torch.where(scale > 0, scale, 1.0)[..., None]
    return steps.round().to(torch.int8), scale


def dequantised(steps: Int8[Tensor, "*n d"], scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
    """What `quantised` was given, to within half a step."""
    return steps * scale[..., None]


class Cache:
    """A folder of prepared clips.

    `fingerprint.json` says with which models and to which size they were made; a recipe that says
    otherwise is refused. Teacher features lie in a folder per teacher, so that recipes with
    different teachers share the rest.
    """

    def __init__(self, recipe: Recipe, create: bool = False) -> None:
        self.root = recipe.data.cache
        data = recipe.data
        wanted = {
            "format": FORMAT,
            "clip": {"frames": data.frames, "height": data.height, "width": data.width},
            "backbone": {"name": recipe.backbone.name} | recipe.backbone.preparing.fingerprint(),
        }
        self._check(wanted, create)
        self.clips, self.failures = self.root / "clips", self.root / "failures"
        self.features = {
            encoder: self.root / f"features8-{encoder.name}-{json_digest(encoder.fingerprint())}"
            for encoder in recipe.stored_encoders
        }
        folders = [self.clips, self.failures, *self.features.values()]
        if create:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)
            for folder in (self.root, *folders):
                sweep(folder)

    def _check(self, wanted: dict[str, Any], create: bool) -> None:
        path = self.root / "fingerprint.json"
        if not path.exists():
            if not create:
                raise UserError(f"There is no cache at {self.root}. Run `videorepa prepare` first.")
            if is_vacant(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                atomic_write(path, json.dumps(wanted, indent=1))
                return
            # Another process that was started with this one may just have written it.
            if not path.exists():
                raise UserError(
                    f"{self.root} exists and is not a cache. Choose another folder as data.cache."
                )
        try:
            found = json.loads(read_text(path))
            differing = [key for key in wanted if found.get(key) != wanted[key]]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); it says what the cache was made with. Delete "
                f"{self.root} and prepare again."
            ) from None
        if differing:
            raise UserError(
                f"The cache {self.root} was made otherwise than this recipe asks; they differ in: "
                + "; ".join(f"{k} (cache {found.get(k)}, recipe {wanted[k]})" for k in differing)
                + ". Choose another data.cache, or delete this one and prepare again."
            )

    def _file(self, folder: Path, item: CaptionedClip) -> Path:
        # Ids can be any text, captions too: neither becomes part of a path.
        return folder / f"{hashlib.sha256(item.id.encode()).hexdigest()[:24]}.safetensors"

    def has_clip(self, item: CaptionedClip, digest: str) -> bool:
        """Whether the clip is there. Raises UserError if it was made from other content."""
        path = self._file(self.clips, item)
        if not path.exists():
            return False
        _, found = _read(path, tensors=False)
        if found != _about(item, digest):
            raise UserError(
                f"The clip {item.id!r} has changed since it was prepared into {self.root}: its "
                "video or its caption is another one. Delete the cache, or give the clip a new id."
            )
        return True

    def write_clip(self, item: CaptionedClip, digest: str, moments: Tensor, text: Text) -> None:
        """Moments (2C, t, h, w) are kept in float16, whose mantissa is finer than bfloat16's and
        whose range latents never leave; embeddings of the text in bfloat16, masks as they are."""
        tensors = {"moments": moments.to("cpu", torch.float16).contiguous()} | _stored(text)
        self._write(self._file(self.clips, item), tensors, _about(item, digest))

    def read_clip(self, item: CaptionedClip) -> tuple[Tensor, Text]:
        """Moments, and what the caption became. Raises UserError if absent, stale or damaged."""
        tensors, about = self._read_item(self.clips, item)
        if about.get("caption") != item.caption:
            raise UserError(
                f"The caption of clip {item.id!r} is not the one the cache was made with. "
                "Prepare into a new cache."
            )
        return tensors["moments"], _text(tensors)

    def has_features(self, item: CaptionedClip, encoder: EncoderSpec) -> bool:
        """Whether an encoder's features of the clip are there."""
        return self._file(self.features[encoder], item).exists()

    def write_features(self, item: CaptionedClip, encoder: EncoderSpec, grid: TokenGrid) -> None:
        """A grid of one clip, in 8 bits: half of bfloat16's room, and the relation loss moves by
        far less than 1 % (dev/log.md)."""
        about = {"id": item.id, "start": str(grid.start), "stride": str(grid.stride)}
        tokens, scale = quantised(grid.tokens[0].cpu())
        tensors = {"tokens": tokens.contiguous(), "scale": scale.contiguous()}
        if grid.saliency is not None:
            tensors["saliency"] = grid.saliency[0].to("cpu", torch.float16).contiguous()
        self._write(self._file(self.features[encoder], item), tensors, about)

    def read_features(self, item: CaptionedClip, encoder: EncoderSpec) -> TokenGrid:
        """The encoder's grid of one clip. Raises UserError if absent or damaged."""
        tensors, about = self._read_item(self.features[encoder], item)
        tokens = dequantised(tensors["tokens"], tensors["scale"])[None]
        saliency = tensors["saliency"][None].float() if "saliency" in tensors else None
        return TokenGrid(tokens, int(about["start"]), int(about["stride"]), saliency)

    def has_empty_caption(self) -> bool:
        return (self.root / EMPTY_CAPTION).exists()

    def write_empty_caption(self, text: Text) -> None:
        self._write(self.root / EMPTY_CAPTION, _stored(text), {})

    def read_empty_caption(self) -> Text:
        return _text(_read(self.root / EMPTY_CAPTION)[0])

    def note_failure(self, item: CaptionedClip, reason: str) -> None:
        text = json.dumps({"id": item.id, "reason": reason})
        atomic_write(self._failure(item), text)

    def clear_failure(self, item: CaptionedClip) -> None:
        self._failure(item).unlink(missing_ok=True)

    def _failure(self, item: CaptionedClip) -> Path:
        return self._file(self.failures, item).with_suffix(".json")

    def ready(self, items: list[CaptionedClip]) -> list[CaptionedClip]:
        """The items that can be trained on. Raises UserError if any is neither prepared nor
        reported as failed, or if none is left."""
        failed = [item for item in items if self._failure(item).exists()]
        lost = {item.id for item in failed}
        rest = [item for item in items if item.id not in lost]
        folders = (self.clips, *self.features.values())
        missing = [
            item
            for item in rest
            if not all(self._file(folder, item).exists() for folder in folders)
        ]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(items)} clips are not prepared in {self.root}, the first "
                f"is {missing[0].id!r}. Run `videorepa prepare` with this recipe; it goes on where "
                "it stopped."
            )
        if not rest:
            raise UserError(f"All {len(items)} clips failed in `prepare`; see {self.failures}.")
        return rest

    def _write(self, path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        atomic_write(path, save(tensors, metadata=to_metadata(about)))

    def _read_item(
        self, folder: Path, item: CaptionedClip
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        path = self._file(folder, item)
        if not path.exists():
            raise UserError(f"The clip {item.id!r} is not in the cache. Run `videorepa prepare`.")
        return _read(path)


def _stored(text: Text) -> dict[str, Tensor]:
    return {
        f"{TEXT}{name}": tensor.to(
            "cpu", torch.bfloat16 if tensor.is_floating_point() else tensor.dtype
        ).contiguous()
        for name, tensor in text.items()
    }


def _text(tensors: dict[str, Tensor]) -> Text:
    names = sorted(name for name in tensors if name.startswith(TEXT))
    return {name.removeprefix(TEXT): tensors[name] for name in names}


def _about(item: CaptionedClip, digest: str) -> dict[str, str]:
    return {"id": item.id, "caption": item.caption, "source": digest}


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
            return content, from_metadata(file.metadata())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read ({error}). Delete it and run `videorepa prepare` again."
        ) from None
