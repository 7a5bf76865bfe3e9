"""Keeps latents, text embeddings and teacher features on disk, in one file for each clip.

Each file is written whole or not at all. So a killed process loses one clip's work, and any number
of processes can share the work.
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
from videorepa.data.source import SourceClip
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
    """Round tokens to 8 bits: token / scale, where a token's scale is its largest channel / 127."""
    tokens = tokens.float()
    scale = tokens.abs().amax(-1) / 127
    steps = tokens / torch.where(scale > 0, scale, 1.0)[..., None]
    return steps.round().to(torch.int8), scale


def dequantised(steps: Int8[Tensor, "*n d"], scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
    """Restore tokens from 8 bits; each channel is off by at most half its token's scale."""
    return steps * scale[..., None]


class Cache:
    """A folder of prepared clips.

    Its `fingerprint.json` records the backbone and the clip size that they were made with. Each
    teacher's features have a folder of their own, so recipes with different teachers share the
    rest.

    Args:
      recipe: Names the folder, the models and the clip size.
      create: Make the folder if it does not exist.

    Raises:
      UserError: The folder is no cache, or one of another backbone or clip size.
    """

    def __init__(self, recipe: Recipe, create: bool = False) -> None:
        self.root = recipe.data.cache
        data = recipe.data
        made_with = {
            "format": FORMAT,
            "clip": {"frames": data.frames, "height": data.height, "width": data.width},
            "backbone": {"name": recipe.backbone.name} | recipe.backbone.preparing.fingerprint(),
        }
        self._check(made_with, create)
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

    def _check(self, made_with: dict[str, Any], create: bool) -> None:
        path = self.root / "fingerprint.json"
        if not path.exists():
            if not create:
                raise UserError(f"There is no cache at {self.root}. Run `videorepa prepare` first.")
            if is_vacant(self.root):
                self.root.mkdir(parents=True, exist_ok=True)
                atomic_write(path, json.dumps(made_with, indent=1))
                return
            # Another process that was started at the same time may just have written it.
            if not path.exists():
                raise UserError(
                    f"{self.root} exists and is not a cache. Choose another folder as data.cache."
                )
        try:
            before = json.loads(read_text(path))
            differing = [key for key, value in made_with.items() if before.get(key) != value]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); it says what the cache was made with. Delete "
                f"{self.root} and prepare again."
            ) from None
        if differing:
            raise UserError(
                f"The cache {self.root} was made otherwise than this recipe asks; they differ in: "
                + "; ".join(
                    f"{key} (cache {before.get(key)}, recipe {made_with[key]})" for key in differing
                )
                + ". Choose another data.cache, or delete this one and prepare again."
            )

    def _file(self, folder: Path, item: SourceClip) -> Path:
        # An id can be any text, so it cannot be a file's name.
        return folder / f"{hashlib.sha256(item.id.encode()).hexdigest()[:24]}.safetensors"

    def has_clip(self, item: SourceClip, digest: str) -> bool:
        """Whether the clip is in the cache. Raises UserError if it was made from other content."""
        path = self._file(self.clips, item)
        if not path.exists():
            return False
        _, about = _read(path, tensors=False)
        if about != _about(item, digest):
            raise UserError(
                f"The clip {item.id!r} has changed since it was prepared into {self.root}: its "
                "video or its caption is not the same. Delete the cache, or give the clip a new id."
            )
        return True

    def write_clip(self, item: SourceClip, digest: str, moments: Tensor, text: Text) -> None:
        """Write a clip's latent moments and its text.

        Moments are kept in float16: its mantissa is finer than bfloat16's, and latents stay within
        its range. Text embeddings are kept in bfloat16.

        Args:
          item: The clip.
          digest: Of its content, so that `has_clip` can tell whether it has changed.
          moments: (2C, t, h, w), mean and log-variance of the latents.
          text: Its caption's tensors.
        """
        tensors = {"moments": moments.to("cpu", torch.float16).contiguous()} | _stored(text)
        self._write(self._file(self.clips, item), tensors, _about(item, digest))

    def read_clip(self, item: SourceClip) -> tuple[Tensor, Text]:
        """Read a clip's moments and text. Raises UserError if absent, stale or damaged."""
        tensors, about = self._read_item(self.clips, item)
        if about.get("caption") != item.caption:
            raise UserError(
                f"The caption of clip {item.id!r} is not the one the cache was made with. "
                "Prepare into a new cache."
            )
        return tensors["moments"], _text(tensors)

    def has_features(self, item: SourceClip, encoder: EncoderSpec) -> bool:
        """Whether an encoder's features of the clip are in the cache."""
        return self._file(self.features[encoder], item).exists()

    def write_features(self, item: SourceClip, encoder: EncoderSpec, grid: TokenGrid) -> None:
        """Write an encoder's features of one clip, in 8 bits.

        They take half the space of bfloat16 and change the relation loss by far less than 1 %
        (dev/log.md).
        """
        about = {"id": item.id, "start": str(grid.start), "stride": str(grid.stride)}
        tokens, scale = quantised(grid.tokens[0].cpu())
        tensors = {"tokens": tokens.contiguous(), "scale": scale.contiguous()}
        if grid.saliency is not None:
            tensors["saliency"] = grid.saliency[0].to("cpu", torch.float16).contiguous()
        self._write(self._file(self.features[encoder], item), tensors, about)

    def read_features(self, item: SourceClip, encoder: EncoderSpec) -> TokenGrid:
        """Read an encoder's features of one clip. Raises UserError if absent or damaged."""
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

    def note_failure(self, item: SourceClip, reason: str) -> None:
        text = json.dumps({"id": item.id, "reason": reason})
        atomic_write(self._failure(item), text)

    def clear_failure(self, item: SourceClip) -> None:
        self._failure(item).unlink(missing_ok=True)

    def _failure(self, item: SourceClip) -> Path:
        return self._file(self.failures, item).with_suffix(".json")

    def ready(self, items: list[SourceClip]) -> list[SourceClip]:
        """Select the items that can be trained on: those that `prepare` did not report as failed.

        Raises:
          UserError: One of them is not prepared, or all have failed.
        """
        rest = [item for item in items if not self._failure(item).exists()]
        folders = (self.clips, *self.features.values())
        missing = [
            item
            for item in rest
            if not all(self._file(folder, item).exists() for folder in folders)
        ]
        if missing:
            raise UserError(
                f"{len(missing)} of {len(items)} clips are not prepared in {self.root}; the first "
                f"is {missing[0].id!r}. Run `videorepa prepare` with this recipe; it goes on where "
                "it stopped."
            )
        if not rest:
            raise UserError(f"All {len(items)} clips failed in `prepare`; see {self.failures}.")
        return rest

    def _write(self, path: Path, tensors: dict[str, Tensor], about: dict[str, str]) -> None:
        atomic_write(path, save(tensors, metadata=to_metadata(about)))

    def _read_item(
        self, folder: Path, item: SourceClip
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


def _about(item: SourceClip, digest: str) -> dict[str, str]:
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
