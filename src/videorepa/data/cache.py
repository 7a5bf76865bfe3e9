"""Keeps latents, text embeddings and teacher features on disk, in one file for each clip.

Each file is written whole or not at all. So a killed process loses one clip's work, and any number
of processes can share the work.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int8
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from videorepa.backbones import Image, Text
from videorepa.data.sampling import Sampling
from videorepa.data.source import SourceClip
from videorepa.data.video import READER
from videorepa.encoders import EncoderSpec
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.system.checks import check_finite, check_shapes
from videorepa.system.files import (
    atomic_write,
    from_metadata,
    is_vacant,
    parse_json,
    read_text,
    to_metadata,
)
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid

FORMAT = 3

EMPTY_CAPTION = "empty-caption.safetensors"

TEXT = "text."

_OTHER_MODEL = "The live model does not do what its description says; mend it."


def quantised(tokens: Float[Tensor, "*n d"]) -> tuple[Int8[Tensor, "*n d"], Float[Tensor, "*n"]]:
    """Round tokens to 8 bits: token / scale, where a token's scale is its largest channel / 127."""
    tokens = tokens.float()
    scale = tokens.abs().amax(-1) / 127
    steps = tokens / torch.where(scale > 0, scale, 1.0)[..., None]
    return steps.round().to(torch.int8), scale


def dequantised(steps: Int8[Tensor, "*n d"], scale: Float[Tensor, "*n"]) -> Float[Tensor, "*n d"]:
    """Restore tokens from 8 bits; each channel is off by at most half its token's scale."""
    return steps * scale[..., None]


@dataclass(frozen=True)
class Record:
    """What a clip in the cache was made from.

    Attributes:
      id: The clip's id.
      caption: Its caption.
      source: The digest of its content.
      tokens: How many tokens the caption has, before it is cut to what the text encoder takes.
      sampling: How it was sampled from its video.
    """

    id: str
    caption: str
    source: str
    tokens: int
    sampling: Sampling


@dataclass(frozen=True)
class Lacks:
    """Why parts of a clip have to be made; true if there are any.

    Attributes:
      latents: Why the latents have to be; "" if they are there.
      text: Why its caption's text embeddings have to be; "" if they are there.
      features: Why each encoder's features have to be; without those that are there.
      image: Why its first frame has to be encoded alone; "" if it is there, or is not needed.
    """

    latents: str
    text: str
    features: dict[EncoderSpec, str]
    image: str = ""

    def __bool__(self) -> bool:
        return bool(self.first)

    @property
    def first(self) -> str:
        """The first of the reasons; "" if nothing has to be made."""
        reasons = (self.latents, self.text, self.image, *self.features.values())
        return next(filter(None, reasons), "")


class Cache:
    """A folder of prepared clips.

    Its `fingerprint.json` records what they were made with: the backbone, the clip size, the
    reader of videos and the precision. Each teacher's features have a folder of their own, so
    recipes with different teachers share the rest. So do images, for models that are shown one.

    Args:
      recipe: Names the folder, the models and the clip size.
      encoded_in: The dtype that clips will be encoded in. The folder is then made if it does not
        exist. By default clips are only read, and may have been encoded in any precision unless
        the recipe asks for float32.

    Raises:
      UserError: The folder is no cache, or one that was made with something else.
    """

    def __init__(self, recipe: Recipe, encoded_in: torch.dtype | None = None) -> None:
        self.root = recipe.data.cache
        data, precision = recipe.data, recipe.train.precision
        made_with: dict[str, Any] = {
            "format": FORMAT,
            "reader": READER,
            "clip": data.model_dump(include={"frames", "height", "width", "fps"}),
            "backbone": {"name": recipe.backbone.name} | recipe.backbone.preparing.fingerprint(),
        }
        if recipe.backbone.tiling:
            made_with["backbone"]["tiling"] = True
        if encoded_in is not None:
            made_with["precision"] = str(encoded_in).removeprefix("torch.")
        elif precision != "auto":
            made_with["precision"] = precision
        create = encoded_in is not None
        self._check(made_with, create)
        self.clips, self.failures = self.root / "clips", self.root / "failures"
        self.captions = self.root / "captions"
        self.digests = self.root / "digests.json"
        self.features = {
            encoder: self.root / f"features8-{encoder.name}-{json_digest(encoder.fingerprint())}"
            for encoder in recipe.stored_encoders
        }
        self.grids = {encoder: encoder.shape(data.frames) for encoder in self.features}
        backbone = recipe.backbone.preparing
        self.text_sees_image = backbone.text_sees_image
        self.text_shapes = {f"{TEXT}{key}": (*like.shape,) for key, like in backbone.text().items()}
        self.shapes = {
            self.captions: self.text_shapes,
            self.clips: {"moments": backbone.moments(data)} | self.text_shapes,
        }
        for encoder, folder in self.features.items():
            self.shapes[folder] = _feature_shapes(self.grids[encoder])
        self.images: Path | None = None
        self.image_likes: Image = {}
        if recipe.backbone.continuation(data) is not None:
            self.image_likes = recipe.backbone.image(data)
        if self.image_likes:
            names = {"tensors": " ".join(sorted(self.image_likes))}
            made_by = json_digest(backbone.image_fingerprint() | names)
            self.images = self.root / f"images-{made_by}"
            self.shapes[self.images] = {name: (*t.shape,) for name, t in self.image_likes.items()}
        folders = [self.clips, self.captions, self.failures, *self.features.values()]
        folders += [self.images] if self.images else []
        if create:
            for folder in folders:
                folder.mkdir(parents=True, exist_ok=True)

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
            before = parse_json(read_text(path))
            differing = [key for key, value in made_with.items() if before.get(key) != value]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); it says what the cache was made with. Delete "
                f"{self.root} and prepare again."
            ) from None
        if "format" in differing:
            raise UserError(
                f"The cache {self.root} was made by another version of videorepa: its format is "
                f"{before.get('format')}, expected {FORMAT}. Choose another data.cache, or delete "
                "this one and prepare again."
            )
        # The device would encode in bfloat16, but can go on in float32.
        is_narrower = differing == ["precision"] and before["precision"] == "float32"
        if differing:
            raise UserError(
                f"The cache {self.root} was made otherwise than this recipe asks; they differ in: "
                + "; ".join(
                    f"{key} (cache {before.get(key)}, recipe {made_with[key]})" for key in differing
                )
                + ". Choose another data.cache, or delete this one and prepare again"
                + (", or prepare with --train.precision float32." if is_narrower else ".")
            )

    def _file(self, folder: Path, clip: SourceClip | Record) -> Path:
        # An id can be any text, so it cannot be a file's name.
        return folder / f"{hashlib.sha256(clip.id.encode()).hexdigest()[:24]}.safetensors"

    def look_up(self, clip: SourceClip, source: str | None) -> tuple[Record | None, Lacks]:
        """Find out what a clip in the cache was made from, None if it is not there, and what lacks.

        Args:
          clip: The clip as the source has it now.
          source: The digest of its content, or None if its video is gone, which cannot differ.

        Raises:
          UserError: A file is damaged or another clip's.
        """
        replaced = "its video has changed"
        record, latents, text = self._record(clip), "", ""
        if record is None:
            latents = text = "it is not there"
        elif source not in (None, record.source):
            latents = text = replaced
        elif clip.caption != record.caption:
            text = "its caption has changed"
        features = {}
        for encoder, folder in self.features.items():
            about = self._about(folder, clip)
            if about is None:
                features[encoder] = f"its features of {encoder.name} are not there"
            elif about.get("source") != (source or (record and record.source)):
                features[encoder] = replaced
        image = ""
        if self.images is not None:
            about = self._about(self.images, clip)
            if about is None:
                image = "its first frame's own encoding is not there"
            elif about.get("source") != (source or (record and record.source)):
                image = replaced
        return record, Lacks(latents, text, features, image)

    def _record(self, clip: SourceClip) -> Record | None:
        about = self._about(self.clips, clip)
        if about is None:
            return None
        try:
            sampling = Sampling(**about.pop("sampling"))
            return Record(**about, sampling=sampling)
        except (KeyError, TypeError) as error:
            raise _damaged(self._file(self.clips, clip), error) from None

    def keep_caption(self, clip: SourceClip, source: str, tokens: int, text: Text) -> None:
        """Keep a clip's text until `write_clip` has its latents.

        Args:
          clip: The clip.
          source: The digest of its content.
          tokens: How many tokens the caption has, as in `Record`.
          text: Its caption's tensors.

        Raises:
          UserError: As `write_clip` does.
        """
        tensors, what = _stored(text), f"The text embeddings of the clip {clip.id!r}"
        _check_made(what, tensors, self.text_shapes)
        about = {"id": clip.id, "caption": clip.caption, "source": source, "tokens": tokens}
        _write(self._file(self.captions, clip), tensors, about)

    def has_caption(self, clip: SourceClip, source: str) -> bool:
        """Whether the text of the clip's caption is kept, and was made from what it is made from.

        Args:
          clip: The clip.
          source: The digest of its content, some of which a text encoder can see.
        """
        about = self._about(self.captions, clip)
        if about is None or about.get("caption") != clip.caption:
            return False
        return not self.text_sees_image or about.get("source") == source

    def read_caption(self, clip: SourceClip) -> tuple[int, Text]:
        """Read what `keep_caption` has kept. Raises UserError as `read_clip` does."""
        folder = self.captions
        try:
            tensors, about = self._read_clip(folder, clip, "text embeddings")
        except UserError:
            # Another process that prepares the same clips may have put it with its latents.
            if self._file(folder, clip).exists() or not self._file(self.clips, clip).exists():
                raise
            folder = self.clips
            tensors, about = self._read_clip(folder, clip, "text embeddings")
        if not isinstance(tokens := about.get("tokens"), int):
            raise _damaged(self._file(folder, clip), KeyError("tokens"))
        return tokens, _text(tensors)

    def write_clip(self, record: Record, moments: Tensor, text: Text) -> None:
        """Write a clip's latent moments and its text.

        Moments are kept in float16: its mantissa is finer than bfloat16's, and latents stay within
        its range. Text embeddings are kept in bfloat16.

        Args:
          record: The clip, and what it was made from.
          moments: (2C, t, h, w), mean and log-variance of the latents.
          text: Its caption's tensors.

        Raises:
          UserError: A value is not finite, or a shape is not as the backbone's description says.
        """
        tensors = {"moments": moments.to("cpu", torch.float16).contiguous()} | _stored(text)
        what = f"The latents or text embeddings of the clip {record.id!r}"
        _check_made(what, tensors, self.shapes[self.clips])
        _write(self._file(self.clips, record), tensors, asdict(record))
        self._file(self.captions, record).unlink(missing_ok=True)

    def read_clip(self, clip: SourceClip) -> tuple[Tensor, Text]:
        """Read a clip's moments and text.

        Raises:
          UserError: They are absent, damaged, not finite, of other shapes or another clip's.
        """
        tensors, _ = self._read_clip(self.clips, clip, "latents or text embeddings")
        return tensors["moments"], _text(tensors)

    def write_features(
        self, clip: SourceClip, source: str, encoder: EncoderSpec, grid: TokenGrid
    ) -> None:
        """Write an encoder's features of one clip, in 8 bits.

        They take half the space of bfloat16 and change the relation loss by far less than 1 %
        (dev/log.md).

        Args:
          clip: The clip.
          source: The digest of its content.
          encoder: What gave the features.
          grid: The features.

        Raises:
          UserError: A value is not finite, or the grid is not as the encoder's description says.
        """
        folder, expected = self.features[encoder], self.grids[encoder]
        tokens, scale = quantised(grid.tokens[0].cpu())
        tensors = {"tokens": tokens.contiguous(), "scale": scale.contiguous()}
        if grid.saliency is not None:
            tensors["saliency"] = grid.saliency[0].to("cpu", torch.float16).contiguous()
        what = f"The features that {encoder.name} gives of the clip {clip.id!r}"
        _check_made(what, tensors, self.shapes[folder])
        if (grid.start, grid.stride) != (expected.start, expected.stride):
            raise UserError(f"{what} are on the grid {grid}, expected {expected}. {_OTHER_MODEL}")
        _write(self._file(folder, clip), tensors, {"id": clip.id, "source": source})

    def read_features(self, clip: SourceClip, encoder: EncoderSpec) -> TokenGrid:
        """Read an encoder's features of one clip. Raises UserError as `read_clip` does."""
        what = f"features of {encoder.name}"
        tensors, _ = self._read_clip(self.features[encoder], clip, what)
        tokens = dequantised(tensors["tokens"], tensors["scale"])[None]
        saliency = tensors["saliency"][None].float() if "saliency" in tensors else None
        return replace(self.grids[encoder], tokens=tokens, saliency=saliency)

    def write_image(self, clip: SourceClip, source: str, image: Image) -> None:
        """Write what a clip's first frame was encoded as.

        Args:
          clip: The clip.
          source: The digest of its content.
          image: What `Backbone.encode_image` made of it, without the batch dimension.

        Raises:
          UserError: As `write_clip` does.
        """
        assert self.images is not None
        what = f"The image of the clip {clip.id!r}"
        tensors = {
            name: tensor.to("cpu", self.image_likes[name].dtype).contiguous()
            for name, tensor in image.items()
        }
        _check_made(what, tensors, self.shapes[self.images])
        _write(self._file(self.images, clip), tensors, {"id": clip.id, "source": source})

    def read_image(self, clip: SourceClip) -> Image:
        """Read what `write_image` wrote; {} where the model needs none. Raises UserError."""
        if self.images is None:
            return {}
        return self._read_clip(self.images, clip, "image")[0]

    def has_empty_caption(self) -> bool:
        return (self.root / EMPTY_CAPTION).exists()

    def write_empty_caption(self, text: Text) -> None:
        """Write the empty caption's text. Raises UserError as `write_clip` does."""
        tensors, what = _stored(text), "The text embeddings of the empty caption"
        _check_made(what, tensors, self.text_shapes)
        _write(self.root / EMPTY_CAPTION, tensors, {})

    def read_empty_caption(self) -> Text:
        """Read the empty caption's text. Raises UserError as `read_clip` does."""
        path = self.root / EMPTY_CAPTION
        tensors, _ = _read(path)
        _check_read(f"The text embeddings in {path}", tensors, self.text_shapes)
        return _text(tensors)

    def note_failure(self, clip: SourceClip, reason: str) -> None:
        text = json.dumps({"id": clip.id, "reason": reason})
        atomic_write(self._failure_file(clip), text)

    def clear_failure(self, clip: SourceClip) -> None:
        self._failure_file(clip).unlink(missing_ok=True)

    def failure(self, clip: SourceClip) -> str | None:
        """Why `prepare` could not use the clip, or None if it did not fail."""
        path = self._failure_file(clip)
        try:
            return parse_json(path.read_text(encoding="utf-8"))["reason"]
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _damaged(path, error) from None

    def _failure_file(self, clip: SourceClip) -> Path:
        return self._file(self.failures, clip).with_suffix(".json")

    def _about(self, folder: Path, clip: SourceClip) -> dict[str, Any] | None:
        """What the clip's file in a folder is about, or None if there is none."""
        path = self._file(folder, clip)
        return _own(path, clip, _read(path, tensors=False)[1]) if path.exists() else None

    def _read_clip(
        self, folder: Path, clip: SourceClip, what: str
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self._file(folder, clip)
        if not path.exists():
            raise UserError(f"The clip {clip.id!r} is not in the cache. Run `videorepa prepare`.")
        tensors, about = _read(path)
        _own(path, clip, about)
        of = f"The {what} of the clip {clip.id!r} in {path}"
        _check_read(of, tensors, self.shapes[folder])
        return tensors, about


def _feature_shapes(grid: TokenGrid) -> dict[str, tuple[int, ...]]:
    shapes = {"tokens": (*grid.size, grid.width), "scale": grid.size}
    return shapes if grid.saliency is None else shapes | {"saliency": grid.size}


def _check_made(
    what: str, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> None:
    check_shapes(what, tensors, expected, _OTHER_MODEL)
    check_finite(what, *tensors.values())


def _check_read(
    what: str, tensors: dict[str, Tensor], expected: dict[str, tuple[int, ...]]
) -> None:
    advice = "Delete the file and run `videorepa prepare` again."
    check_shapes(what, tensors, expected, advice)
    check_finite(what, *tensors.values(), advice=advice)


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


def _own(path: Path, clip: SourceClip, about: dict[str, Any]) -> dict[str, Any]:
    """What a file is about, if that is the clip it should be. Raises UserError if not."""
    if about.get("id") != clip.id:
        raise UserError(
            f"{path} is of the clip {about.get('id')!r}, expected {clip.id!r}: files were renamed "
            "or swapped. Delete it and run `videorepa prepare` again."
        )
    return about


def _write(path: Path, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    atomic_write(path, save(tensors, metadata=to_metadata(about)))


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safe_open(path, framework="pt") as file:
            content = {key: file.get_tensor(key) for key in file.keys()} if tensors else {}  # noqa: SIM118
            return content, from_metadata(file.metadata())
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read ({error}). Delete it and run `videorepa prepare` again."
    )
