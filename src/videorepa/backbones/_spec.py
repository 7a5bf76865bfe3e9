"""Describes a diffusers pipeline for a recipe: its configuration, without any weights."""

from __future__ import annotations

import inspect
import json
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from videorepa.backbones._live import Backbone, Config, Image, Part, Text
from videorepa.conditioning import Conditioning, frames_of
from videorepa.errors import UserError, as_user_error
from videorepa.settings.section import Section, Weights
from videorepa.settings.sections import ClipSize, Continuation, Data, Generation, Lora
from videorepa.system.configuration import read_configuration
from videorepa.system.files import until_changed
from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.hub import cached_file, local_copy
from videorepa.system.wording import count
from videorepa.tokens import TokenGrid


@dataclass(frozen=True)
class Geometry:
    """How a clip becomes latents, and latents become tokens.

    Args:
      frames: Frames that a latent covers. The first latent covers the first frame alone.
      pixels: Pixels along a side that a latent covers.
      patch: Latents along a side that a token covers.
      channels: Channels of a latent.
      width: Channels of a token.
      blocks: Blocks of the transformer.
      steps: Latents in time that a token covers.
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


class BackboneShapes(Section):
    """What a clip of one size becomes in a backbone.

    Args:
      latents: Shape of the latents: frames, channels, height, width.
      latent_frames: Frames that a latent covers.
      text: One caption's tensors, without the batch dimension, on the meta device.
      grid: The token grid of every block, on the meta device.
      blocks: Blocks of the transformer.
      parameters: Weights of the transformer.
    """

    model_config = {"arbitrary_types_allowed": True, "frozen": True, "extra": "forbid"}

    latents: tuple[int, int, int, int]
    latent_frames: int
    text: Text
    grid: TokenGrid
    blocks: int
    parameters: int


class BackboneSpec(Section):
    """A diffusers pipeline, as a folder or a Hub id.

    The fields are what a recipe sets; the class variables are what a family declares.

    Attributes:
      name: The family: the name of its file.
      weights: A diffusers pipeline folder, a Hub id, or "micro" or "micro-i2v" for the
        lab's own models.
      prepared_with: Weights whose autoencoder and text encoders `prepare` uses in place of the
        model's own. Checkpoints whose autoencoders differ only in rounding, such as CogVideoX-2B
        and 5B, share a cache this way.
      tiling: Encodes videos of more than 256 pixels a side in overlapping tiles, as diffusers does:
        in a fraction of the memory, with small differences around the seams. Caches are of one
        kind or the other.
      live: The class of the live model.
      pipeline_class: The stock pipeline.
      image_pipeline: The stock pipeline that takes an image, if the family has one.
      also_of: Other stock pipelines whose folders hold the same parts.
      transformer_class: The stock transformer.
      vae_class: The stock autoencoder.
      text_encoders: Stock text encoders by their folders. Each one's tokenizer is in the folder
        of the same name with "tokenizer" for "text_encoder".
      image_processor: The folder of the processor of the image that an encoder sees.
      text_width: The key of the text embeddings' width in the transformer's configuration.
      text_mask: The transformer takes a mask of the text's tokens.
      prompt_arguments: The pipeline's argument for each of a prompt's tensors, by the name that the
        tensor has among the transformer's arguments.
      vocabularies: Folders of the tokenizers that have a vocabulary file of their own.
      has_channels_last: The stock pipeline's latents are (B, F, H, W, C).
      options: Values of model_index.json that the pipeline's constructor takes.
      published: Configurations by the last part of a Hub id, so that `inspect` can describe a
        checkpoint that is not on this machine. They hold only what differs from the stock
        classes' defaults.
      size: The clip size that the model was made for.
      lora_targets: Layers that get adapters unless the recipe names others.
      takes_negative_prompt: The pipeline has a second pass, for a negative prompt.
      is_in_comfyui: ComfyUI's class of the model has all layers that the stock transformer has.
      generation: The authors' sampling settings for the family; `published_generation` gives those
        of a checkpoint.
    """

    live: ClassVar[type[Backbone]]
    pipeline_class: ClassVar[str]
    image_pipeline: ClassVar[str | None] = None
    also_of: ClassVar[tuple[str, ...]] = ()
    transformer_class: ClassVar[str]
    vae_class: ClassVar[str]
    text_encoders: ClassVar[dict[str, str]]
    image_processor: ClassVar[str] = "image_processor"
    text_width: ClassVar[str] = "text_embed_dim"
    text_mask: ClassVar[bool] = False
    prompt_arguments: ClassVar[dict[str, str]] = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_attention_mask",
        "pooled_projections": "pooled_prompt_embeds",
    }
    vocabularies: ClassVar[tuple[str, ...]] = ("tokenizer",)
    has_channels_last: ClassVar[bool] = False
    options: ClassVar[tuple[str, ...]] = ()
    published: ClassVar[dict[str, dict[str, Config]]] = {}
    size: ClassVar[ClipSize]
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    takes_negative_prompt: ClassVar[bool] = True
    is_in_comfyui: ClassVar[bool] = True
    generation: ClassVar[Config] = {}

    name: str
    weights: Weights
    prepared_with: Weights | None = None
    tiling: bool = False

    @property
    @abstractmethod
    def text_tokens(self) -> int:
        """The number of tokens that a caption is padded or cut to."""

    @property
    def told_fps(self) -> float | None:
        """Frames per second that the model is told clips show; None if it is told nothing."""
        return None

    def cut_note(self, what: str, tokens: Mapping[str, int]) -> str:
        """Say how many texts the text encoder does not see whole; "" if it sees them all.

        Args:
          what: What the texts are, in the plural.
          tokens: How many tokens each text has, by its name, as `count_tokens` counts.
        """
        limit = self.text_tokens
        cut = {name: length for name, length in tokens.items() if length > limit}
        if not cut:
            return ""
        name, length = next(iter(cut.items()))
        return (
            f"{len(cut)} of {len(tokens)} {what} are longer than the {limit} tokens that "
            f"{self.weights} takes, and were cut. The first is {name[:80]!r}, with {length}. "
            "Shorten them where the rest matters."
        )

    def compression(self) -> tuple[int, int]:
        """The frames, and the pixels along a side, that a latent covers."""
        vae = self.config("vae")
        return vae["temporal_compression_ratio"], vae["spatial_compression_ratio"]

    def geometry(self) -> Geometry:
        """How this model's configuration maps clips to latents and tokens."""
        transformer = self.config("transformer")
        frames, pixels = self.compression()
        patch = transformer["patch_size"]
        return Geometry(
            frames=frames,
            pixels=pixels,
            # Some families name the patch's size in time, height and width.
            patch=patch if isinstance(patch, int) else patch[-1],
            # The input may hold more than the latents.
            channels=transformer["out_channels"] or transformer["in_channels"],
            width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
            blocks=transformer["num_layers"] + transformer.get("num_single_layers", 0),
            steps=transformer.get("patch_size_t") or 1,
        )

    def text(self) -> Text:
        """One caption's tensors, without the batch dimension, on the meta device."""
        width = self.config("transformer")[self.text_width]
        with torch.device("meta"):
            text = {"encoder_hidden_states": torch.empty(self.text_tokens, width)}
            if self.text_mask:
                text["encoder_attention_mask"] = torch.empty(self.text_tokens, dtype=torch.bool)
        return text

    def raw_text(self) -> Text:
        """The same as the stock pipeline gives it to the transformer, which may take more of it
        than is stored."""
        return self.text()

    def moments(self, size: ClipSize) -> tuple[int, int, int, int]:
        """Shape of what `encode_video` returns of one clip: channels, frames, height, width."""
        geometry = self.geometry()
        height, width = size.height // geometry.pixels, size.width // geometry.pixels
        return 2 * geometry.channels, (size.frames - 1) // geometry.frames + 1, height, width

    @property
    def source(self) -> str:
        """The folder or Hub id that diffusers loads."""
        return self.weights

    @property
    def preparing(self) -> Self:
        """The description of the model that encodes clips and captions."""
        if self.prepared_with is None:
            return self
        return self.model_copy(update={"weights": self.prepared_with, "prepared_with": None})

    @property
    def part(self) -> str:
        """The transformer's folder within the pipeline's."""
        return "transformer"

    @property
    def expert_name(self) -> str:
        """What the transformer is called where the pipeline has several, else ""."""
        return ""

    @property
    def idle(self) -> tuple[str, ...]:
        """Parts of the names of weights that have no part in the loss and get no gradient.

        A layer's adapters share its name. Engines that wait for every gradient have to know.
        """
        return ()

    @property
    def lora_pipeline(self) -> str:
        """The stock pipeline that writes and reads LoRA files for the transformer."""
        return self.pipeline_class

    def load(
        self, parts: Sequence[Part], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> Backbone:
        """Load the model, with only the requested parts in memory.

        On the meta device nothing is read: the transformer is made from its configuration, without
        values, and the scheduler has its class's defaults.

        Raises:
          UserError: The folder is damaged or of another kind.
        """
        return self.live(self, parts, device, dtype)

    def config(self, part: str) -> Config:
        """The configuration of a part, completed by the stock class's defaults.

        It comes from the folder where there is one, else from `published`, else from the Hub.

        Args:
          part: "transformer", "vae" or "model_index".
        """
        return self._defaults(part) | self._own_config(part)

    def published_config(self, name: str, part: str) -> Config:
        """The configuration of a part of a published model, by the last part of its Hub id."""
        return self._defaults(part) | self.published[name].get(part, {})

    def _defaults(self, part: str) -> Config:
        classes = {"transformer": self.transformer_class, "vae": self.vae_class}
        return _defaults(classes.get(part, self.pipeline_class))

    @property
    def has_config(self) -> bool:
        """Whether the configuration can always be read without a download."""
        return Path(self.source).exists() or self.source.rsplit("/", 1)[-1] in self.published

    def _own_config(self, part: str) -> Config:
        file = "model_index.json" if part == "model_index" else f"{part}/config.json"
        published = self.published.get(self.source.rsplit("/", 1)[-1])
        if published is not None and not Path(self.source).exists():
            cached = cached_file(self.source, file)
            return _read_json(cached) if cached else published.get(part, {})
        return _read_json(self.folder() / file)

    def folder(self) -> Path:
        """The pipeline's folder on this machine.

        Raises:
          UserError: The folder is not one of this family's pipeline.
        """
        folder = local_copy(self.source)
        index = folder / "model_index.json"
        if folder.is_dir() and not index.exists():
            raise UserError(
                f"{folder} has no model_index.json; expected a diffusers {self.pipeline_class} "
                "folder."
            )
        pipeline = pipeline_of(folder)
        if pipeline not in self.pipelines():
            raise UserError(
                f"{folder} holds a {pipeline}; the backbone {self.name} loads a "
                f"{' or a '.join(self.pipelines())}."
            )
        return folder

    @classmethod
    def pipelines(cls) -> list[str]:
        """The stock pipelines whose folders hold its parts, its own first."""
        image = [cls.image_pipeline] if cls.image_pipeline else []
        return list(dict.fromkeys([cls.pipeline_class, *image, *cls.also_of]))

    def check_clip(self, size: ClipSize) -> None:
        """Check that the model can take clips of a size.

        Raises:
          UserError: It cannot. The message names the nearest size that it can take.
        """
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

    def check_batch(self, clips: int) -> None:
        """Check that the model can be trained on batches of so many clips.

        Raises:
          UserError: It cannot.
        """

    def conditioning(self) -> Conditioning | None:
        """How this checkpoint takes the opening of a clip; None if it takes text alone."""
        return None

    def shown_in_training(self, data: Data) -> str:
        """Say what is shown of a recipe's clips in training; "" if nothing is."""
        conditioning, continuation = self.conditioning(), self.continuation(data)
        if conditioning is None or continuation is None:
            return ""
        return conditioning.described(continuation, self.geometry().frames)

    def continuation(self, data: Data) -> Continuation | None:
        """What is shown of a recipe's clips in training, completed; None if nothing is.

        Raises:
          UserError: The model cannot be trained as `data.condition` says, or clips are too short.
        """
        conditioning = self.conditioning()
        if conditioning is None:
            if data.condition is not None:
                raise UserError(
                    f"The recipe has data.condition, and {self.weights} takes text alone. Leave it "
                    "out, or take a model that continues an image; docs/first-frame.md lists them."
                )
            return None
        chosen = conditioning.completed(data.condition, self.weights)
        if chosen is not None and chosen.latents:
            stride = self.geometry().frames
            covered = frames_of(max(chosen.latents), stride)
            if data.frames <= covered:
                raise UserError(
                    f"Clips of {count(data.frames, 'frame')} are shown whole: data.condition shows "
                    f"their first {count(covered, 'frame')}, and nothing is left to continue. Set "
                    f"data.frames to {covered + stride} or more."
                )
        return chosen

    @property
    def takes_image(self) -> bool:
        """Whether the model has no text mode: it has always been shown an image."""
        conditioning = self.conditioning()
        return conditioning is not None and conditioning.is_required

    def check_text_mode(self, doing: str, instead: str = "") -> None:
        """Check that the model works from text alone.

        Args:
          doing: What shows it no image.
          instead: What shows it one, if anything does.

        Raises:
          UserError: It has always been shown an image.
        """
        if self.takes_image:
            advice = instead or "take a text-to-video model"
            raise UserError(
                f"{self.weights} continues an image, and {doing} shows it none: {advice}."
            )

    @property
    def stock_pipeline(self) -> str:
        """The stock pipeline that samples from this checkpoint."""
        return self.stock_image_pipeline if self.takes_image else self.pipeline_class

    @property
    def stock_image_pipeline(self) -> str:
        """The stock pipeline that continues an image from this checkpoint."""
        assert self.image_pipeline is not None
        return self.image_pipeline

    @property
    def text_sees_image(self) -> bool:
        """Whether a text encoder sees a clip's first frame beside its caption."""
        return False

    def text_encoder_classes(self) -> dict[str, str]:
        """This checkpoint's stock text encoders by their folders."""
        return self.text_encoders

    def image_encoders(self) -> dict[str, str]:
        """The stock encoder of images by its folder; its processor is in `image_processor`."""
        return {}

    def image(self, size: ClipSize) -> Image:
        """What `encode_image` returns of one clip, without the batch dimension, on the meta device,
        in the dtypes in which it is stored. It is {} where the clip's own latents are enough."""
        return {}

    def image_fingerprint(self) -> dict[str, str]:
        """Digests of what stored images depend on, besides what `fingerprint` has."""
        return {part: weights_digest(self.folder() / part) for part in self.image_encoders()}

    def published_generation(self) -> Config:
        """The authors' sampling settings, used where a recipe's `generation` sets none.

        A recipe means the same before a download and after it: for a Hub id that is not in
        `published`, they are the family's.
        """
        return self.generation

    def check_generation(self, settings: Generation) -> None:
        """Check that the model's pipeline has the settings that are switched on.

        Raises:
          UserError: It lacks one.
        """
        if settings.dynamic_guidance and not self.generation.get("dynamic_guidance", True):
            raise UserError(
                "Only CogVideoX has generation.dynamic_guidance; set it to false for "
                f"{self.weights}."
            )
        if settings.negative_prompt and not self.takes_negative_prompt:
            raise UserError(
                f"{self.weights} is told its guidance and has no second pass, which "
                "generation.negative_prompt is for; leave that empty."
            )

    def shapes(self, size: ClipSize) -> BackboneShapes:
        """Work out what a clip becomes, from configuration files alone.

        Raises:
          UserError: The model cannot take clips of that size.
        """
        with self.described():
            return self._shapes(size)

    def _shapes(self, size: ClipSize) -> BackboneShapes:
        self.check_clip(size)
        geometry = self.geometry()
        steps = (size.frames - 1) // geometry.stride + 1
        h, w = size.height // geometry.pixels, size.width // geometry.pixels
        patch = geometry.patch
        grid = torch.empty(1, steps, h // patch, w // patch, geometry.width, device="meta")
        return BackboneShapes(
            latents=(steps * geometry.steps, geometry.channels, h, w),
            latent_frames=geometry.frames,
            text=self.text(),
            grid=TokenGrid(grid, start=1 - geometry.stride, stride=geometry.stride),
            blocks=geometry.blocks,
            parameters=_parameters(self.transformer_class, json.dumps(self.config("transformer"))),
        )

    def described(self) -> AbstractContextManager[None]:
        """Turn any error inside the `with` block, which reads the configuration, into a UserError.

        It holds values of every kind, and stock classes check few of them.
        """
        return as_user_error(
            lambda error: (
                f"The configuration of {self.weights} describes no {self.pipeline_class} "
                f"({type(error).__name__}: {str(error)[:200]}). Compare it with the folder that it "
                "was copied from."
            )
        )

    def least_size(self) -> ClipSize:
        """The smallest clip on which every weight is used: two tokens each way."""
        geometry = self.geometry()
        side = 2 * geometry.pixels * geometry.patch
        return ClipSize(frames=1 + geometry.stride, height=side, width=side)

    def default_size(self) -> ClipSize:
        """The clip size that the model was made for."""
        return self.size

    def sampled_size(self, size: ClipSize) -> ClipSize:
        """The clip nearest to one of a size that the stock pipeline samples as it is asked to."""
        return size

    def skeleton(self, dtype: torch.dtype) -> Any:
        """The frozen transformer as it would be loaded, but on the meta device."""
        model = _on_meta(self.transformer_class, self.config("transformer"))
        model.eval().requires_grad_(False)
        kept = model._keep_in_fp32_modules or ()
        # Non-persistent buffers, such as position tables, keep the dtype that the class gives them.
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and not set(kept).intersection(name.split(".")):
                tensor.data = tensor.data.to(dtype)
        return model

    def vae_skeleton(self, dtype: torch.dtype) -> Any:
        """The frozen autoencoder as it would be loaded, but on the meta device."""
        model = _on_meta(self.vae_class, self.config("vae")).eval().requires_grad_(False)
        for tensor in model.parameters():
            tensor.data = tensor.data.to(dtype)
        return model

    def add_lora(self, transformer: Any, lora: Lora) -> None:
        """Inject LoRA adapters into a transformer.

        Raises:
          UserError: A target names no layer.
        """
        from peft import LoraConfig

        # peft's type hint is int, but any number works.
        alpha: Any = lora.alpha
        targets = list(lora.targets or self.lora_targets)
        config = LoraConfig(r=lora.rank, lora_alpha=alpha, target_modules=targets)
        try:
            transformer.add_adapter(config)
        except ValueError as error:
            raise UserError(f"LoRA cannot be added: {error} Check train.lora.targets.") from None

    def lora_parameters(self, lora: Lora) -> int:
        """Count the weights that adapters would have.

        Raises:
          UserError: A target names no layer.
        """
        model = self.skeleton(torch.float32)
        with torch.device("meta"):
            self.add_lora(model, lora)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def fingerprint(self) -> dict[str, str]:
        """Digests of everything that stored latents and text embeddings depend on."""
        # The latents' scale is left out. Moments are stored unscaled, so checkpoints that share a
        # VAE (CogVideoX 2B and 5B) share a cache.
        parts = ("vae", *self.text_encoders, *self.vocabularies)
        digests = {part: weights_digest(self.folder() / part) for part in parts}
        return digests | {"text_tokens": str(self.text_tokens)}

    def weights_digest(self) -> str:
        """A digest of the transformer's weights."""
        return weights_digest(self.folder() / "transformer")

    def identity(self) -> dict[str, str]:
        """Digests of everything that decides what the model makes of a clip and a caption: its
        weights, and the settings of its description that are not the defaults."""
        settings = self.model_dump(
            mode="json", exclude_defaults=True, exclude={"name", "weights", "prepared_with"}
        )
        told = {"settings": json_digest(settings)} if settings else {}
        return self.fingerprint() | {"transformer": self.weights_digest()} | told

    def weight_files(self) -> list[Path]:
        """The transformer's weight files on this machine, in order. Nothing is downloaded."""
        index = Path(self.source) / "model_index.json"
        if not Path(self.source).exists():
            index = cached_file(self.source, index.name) or index
        return sorted((index.parent / self.part).glob("*.safetensors"))


TWO_STREAMS = (*BackboneSpec.lora_targets, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
"""LoRA targets for transformers whose text has projections of its own: both streams get adapters,
as CogVideoX's single stream does."""


@cache
def _defaults(stock_class: str) -> Config:
    """Default arguments of a diffusers class: its config.json files may leave them out."""
    import diffusers

    parameters = inspect.signature(getattr(diffusers, stock_class).__init__).parameters
    return {name: p.default for name, p in parameters.items() if p.default is not p.empty}


def _on_meta(stock_class: str, config: Config) -> Any:
    import diffusers

    with torch.device("meta"):
        return getattr(diffusers, stock_class).from_config(config)


@cache
def _parameters(stock_class: str, config: str) -> int:
    return sum(p.numel() for p in _on_meta(stock_class, json.loads(config)).parameters())


_configuration = until_changed(read_configuration)


def pipeline_of(folder: Path) -> str | None:
    """The class of a diffusers folder's pipeline. Raises UserError if it cannot be read."""
    return _read_json(folder / "model_index.json").get("_class_name")


def _read_json(path: Path) -> Config:
    try:
        return _configuration(path)
    except FileNotFoundError:
        raise UserError(f"There is no {path}; is this a diffusers folder?") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as a model's configuration: {error}") from None
