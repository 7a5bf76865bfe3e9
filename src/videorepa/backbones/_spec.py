"""What a recipe holds of a diffusers pipeline: its configuration, without any weights."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import torch

from videorepa.backbones import BackboneShapes, BackboneSpec, Text
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Lora
from videorepa.system.fingerprint import weights_digest
from videorepa.system.hub import cached_file, local_copy
from videorepa.tokens import TokenGrid

Config = dict[str, Any]

TWO_STREAMS = (*BackboneSpec.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""Adapters where text has projections of its own, so that both streams get them as CogVideoX's
one does."""


@dataclass(frozen=True)
class Geometry:
    """How a clip becomes latents, and latents become tokens.

    frames, pixels: what a latent covers in time and in space; the first frame has a latent alone.
    steps, patch: latents that a token covers in time and in space. channels: of a latent.
    width: of a token. blocks: how many the transformer has.
    """

    frames: int
    pixels: int
    patch: int
    channels: int
    width: int
    blocks: int
    steps: int = 1

    @property
    def stride(self) -> int:
        """Frames that a token covers. The first token covers the first frame alone."""
        return self.frames * self.steps


class DiffusersSpec(BackboneSpec):
    """A diffusers pipeline, as a folder or a Hub id.

    The class variables name stock classes: the pipeline's (and, in `also_of`, of other pipelines
    whose folders hold the same parts), the transformer's, the VAE's and the text encoders' by
    their folders. A tokenizer's folder is called as its encoder's. vocabularies: those tokenizers
    that have a file of their own. options: values of model_index.json that the pipeline takes.
    published: by the end of a Hub id, what inspect needs to know of a checkpoint that is not on
    this machine, as far as it is not the classes' default.
    """

    pipeline_class: ClassVar[str]
    also_of: ClassVar[tuple[str, ...]] = ()
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str]
    text_encoders: ClassVar[dict[str, str]]
    vocabularies: ClassVar[tuple[str, ...]] = ("tokenizer",)
    options: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[dict[str, dict[str, Config]]] = {}
    size: ClassVar[ClipSize]

    @property
    def text_tokens(self) -> int:
        """To how many tokens a caption is padded or cut."""
        raise NotImplementedError

    def geometry(self) -> Geometry:
        raise NotImplementedError

    def text(self) -> Text:
        """One caption's tensors, on the meta device."""
        raise NotImplementedError

    def config(self, part: str) -> Config:
        """The configuration of "transformer", "vae" or "model_index": from the folder, else as
        published, else from the Hub; over the defaults of the stock class."""
        kinds = {"transformer": self.transformer_class, "vae": self.vae_class}
        kind = kinds.get(part, self.pipeline_class)
        return _defaults(kind) | self._own_config(part)

    def _own_config(self, part: str) -> Config:
        file = "model_index.json" if part == "model_index" else f"{part}/config.json"
        published = self.published.get(self.source.rsplit("/", 1)[-1])
        if published is not None and not Path(self.source).exists():
            found = cached_file(self.source, file)
            return _read_json(found) if found else published.get(part, {})
        return _read_json(self.folder() / file)

    def folder(self) -> Path:
        """The pipeline's folder on this machine. Raises UserError if it is of another kind."""
        folder = local_copy(self.source)
        index = folder / "model_index.json"
        if folder.is_dir() and not index.exists():
            raise UserError(
                f"{folder} has no model_index.json; expected a diffusers {self.pipeline_class} "
                "folder."
            )
        found = _read_json(index).get("_class_name")
        if found not in (self.pipeline_class, *self.also_of):
            raise UserError(
                f"{folder} holds a {found}; the backbone {self.name} loads a {self.pipeline_class}."
            )
        return folder

    def check_clip(self, size: ClipSize) -> None:
        geometry = self.geometry()
        stride, unit = geometry.stride, geometry.pixels * geometry.patch
        if (size.frames - 1) % stride:
            near = max(1, round((size.frames - 1) / stride)) * stride + 1
            raise UserError(
                f"{self.weights} takes 1 + {stride}k frames; the recipe asks for {size.frames}. "
                f"Try {near}."
            )
        if size.height % unit or size.width % unit:
            near = [max(unit, round(side / unit) * unit) for side in (size.height, size.width)]
            raise UserError(
                f"{self.weights} takes heights and widths that are multiples of {unit}; the recipe "
                f"asks for {size.height}x{size.width}. Try {near[0]}x{near[1]}."
            )

    def shapes(self, size: ClipSize) -> BackboneShapes:
        self.check_clip(size)
        geometry = self.geometry()
        steps = (size.frames - 1) // geometry.stride + 1
        h, w = size.height // geometry.pixels, size.width // geometry.pixels
        patch = geometry.patch
        grid = torch.empty(1, steps, h // patch, w // patch, geometry.width, device="meta")
        return BackboneShapes(
            latents=(steps * geometry.steps, geometry.channels, h, w),
            text=self.text(),
            grid=TokenGrid(grid, start=1 - geometry.stride, stride=geometry.stride),
            blocks=geometry.blocks,
            parameters=_parameters(self.transformer_class, json.dumps(self.config("transformer"))),
        )

    @property
    def lora_pipeline(self) -> str:
        return self.pipeline_class

    def skeleton(self, dtype: torch.dtype) -> Any:
        """The transformer as it would be loaded, frozen, on the meta device: nothing is read."""
        model = _on_meta(self.transformer_class, self.config("transformer"))
        model.eval().requires_grad_(False)
        kept = model._keep_in_fp32_modules or ()
        # What is not in a file, such as tables of positions, is as the class makes it.
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and not set(kept).intersection(name.split(".")):
                tensor.data = tensor.data.to(dtype)
        return model

    def lora_parameters(self, lora: Lora) -> int:
        model = self.skeleton(torch.float32)
        with torch.device("meta"):
            self.add_lora(model, lora)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def fingerprint(self) -> dict[str, str]:
        # How latents are scaled is left out: moments are stored unscaled, so that checkpoints that
        # share a VAE (CogVideoX 2B and 5B) share a cache.
        parts = ("vae", *self.text_encoders, *self.vocabularies)
        digests = {part: weights_digest(self.folder() / part) for part in parts}
        return digests | {"text_tokens": str(self.text_tokens)}

    def weights_digest(self) -> str:
        return weights_digest(self.folder() / "transformer")

    @property
    def part(self) -> str:
        """The folder of the transformer in the pipeline's."""
        return "transformer"

    def weight_files(self) -> list[Path]:
        return sorted((Path(self.source) / self.part).glob("*.safetensors"))

    def default_size(self) -> ClipSize:
        return self.size


@cache
def _defaults(kind: str) -> Config:
    """Default arguments of a class of diffusers: what its config.json files may leave out."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, kind).__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _on_meta(kind: str, config: Config) -> Any:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, kind).from_config(config)


@cache
def _parameters(kind: str, config: str) -> int:
    return sum(p.numel() for p in _on_meta(kind, json.loads(config)).parameters())


@cache
def _read_json(path: Path) -> Config:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"There is no {path}; is this a diffusers folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}; expected keys and values.")
    return values
