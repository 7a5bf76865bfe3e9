"""What all backbones from diffusers share: a folder, its configuration and the live parts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from videorepa.backbones import Backbone, BackboneShapes, BackboneSpec, Part, Text
from videorepa.data.fingerprint import weights_digest
from videorepa.diffusion import Denoised, FlowMatching, VPrediction
from videorepa.errors import UserError
from videorepa.hub import cached_file, local_copy, quieten_libraries
from videorepa.recipe import ClipSize, Generation, Lora
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


class DiffusersBackbone(Backbone):
    """The live model; parts that were not asked for are None.

    A subclass says what differs. As it stands, the model is one of flow matching that is given one
    text encoder's embeddings, takes (B, C, F, H, W) and gives the velocity alike.
    """

    diffusion: VPrediction | FlowMatching

    def __init__(
        self, spec: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        import diffusers

        quieten_libraries()
        self.spec, self.device, self.dtype, self.part = spec, device, dtype, spec.part
        self.geometry = spec.geometry()
        self.vae: Any = None
        self.transformer: Any = None
        self.text_parts: dict[str, Any] = {}
        for name in spec.text_encoders:
            self.text_parts |= {name: None, _tokenizer_of(name): None}
        with self.loading():
            if "vae" in parts:
                self.vae = self.whole(spec.vae_class, "vae", self.vae_dtype)
            if "text_encoder" in parts:
                for name in spec.text_encoders:
                    self.text_parts |= self._text_part(name)
            if "transformer" in parts and device.type == "meta":
                self.transformer = spec.skeleton(dtype)
            elif "transformer" in parts:
                self.transformer = self.whole(spec.transformer_class, self.part, dtype)
            kind, options = self.scheduler_class()
            scheduler = getattr(diffusers, kind)
            if device.type == "meta":
                with torch.device("cpu"):
                    self.scheduler: Any = scheduler(**options)
            else:
                self.scheduler = scheduler.from_pretrained(
                    spec.folder(), subfolder="scheduler", **options
                )

    @property
    def vae_dtype(self) -> torch.dtype:
        return self.dtype

    def scheduler_class(self) -> tuple[str, Config]:
        """The scheduler's class and what it is told beside its own configuration."""
        # Of a published model that is not on this machine nothing is known but that it is a flow's.
        unknown = ("diffusers", "FlowMatchEulerDiscreteScheduler")
        return self.spec.config("model_index").get("scheduler", unknown)[1], {}

    @contextmanager
    def loading(self):
        """Turns what libraries say of a folder that they cannot load into a UserError."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"The model {self.spec.weights} could not be loaded: {type(error).__name__}: "
                f"{str(error)[:500]}. Compare the folder with the one it was copied from."
            ) from None

    def whole(self, kind: str, part: str, dtype: torch.dtype) -> Any:
        """A part of the pipeline, frozen, with every weight found in its folder: left to
        themselves, diffusers and transformers make up those that are missing."""
        import diffusers
        import transformers

        # A text encoder is a class of transformers, whose option has another name.
        option = "torch_dtype" if hasattr(diffusers, kind) else "dtype"
        loader = getattr(diffusers, kind, None) or getattr(transformers, kind)
        source = self.spec.folder()
        model, found = loader.from_pretrained(
            source, subfolder=part, output_loading_info=True, **{option: dtype}
        )
        if missing := sorted(found["missing_keys"]):
            raise UserError(
                f"{source / part} lacks {len(missing)} of the model's weights, such as "
                f"{', '.join(missing[:4])}. Copy or download the folder again."
            )
        return model.to(self.device).eval().requires_grad_(False)

    def _text_part(self, name: str) -> dict[str, Any]:
        from transformers import AutoTokenizer

        tokenizer = _tokenizer_of(name)
        return {
            name: self.whole(self.spec.text_encoders[name], name, self.dtype),
            tokenizer: AutoTokenizer.from_pretrained(self.spec.folder(), subfolder=tokenizer),
        }

    @cached_property
    def stock(self) -> Any:
        """The stock pipeline around the parts that are loaded."""
        import diffusers

        index = self.spec.config("model_index")
        options = {name: index[name] for name in self.spec.options}
        return getattr(diffusers, self.spec.pipeline_class)(**self.components(), **options)

    def components(self) -> dict[str, Any]:
        """What the stock pipeline is made of."""
        modules = {"vae": self.vae, "transformer": self.transformer, "scheduler": self.scheduler}
        return modules | self.text_parts

    def pipeline(self, transformer: Any = None) -> Any:
        if transformer is not None:
            # Some pipelines read the transformer's configuration when they are made.
            self.transformer = transformer
            self.__dict__.pop("stock", None)
        return self.stock

    def sampling(self, size: ClipSize, settings: Generation) -> Config:
        self.spec.check_generation(settings)
        return {
            "height": size.height,
            "width": size.width,
            "num_frames": size.frames,
            "num_inference_steps": settings.steps,
            "guidance_scale": settings.guidance_scale,
            "max_sequence_length": self.spec.text_tokens,
        }

    def blocks(self) -> Sequence[nn.Module]:
        """The transformer's blocks in the order in which they run."""
        return self.transformer.transformer_blocks

    def block(self, number: int) -> nn.Module:
        blocks = self.blocks()
        if not 1 <= number <= len(blocks):
            raise UserError(
                f"align.block is {number}, counted from 1; {self.spec.weights} has {len(blocks)} "
                "blocks."
            )
        return blocks[number - 1]

    def grid(self, output: Any, latents: Float[Tensor, "b f c h w"]) -> TokenGrid:
        # Blocks with a stream of text give (video, text). Video tokens lie row by row, frame by
        # frame, in all models here.
        tokens = output[0] if isinstance(output, tuple) else output
        b, t, _, h, w = latents.shape
        steps, patch, stride = self.geometry.steps, self.geometry.patch, self.geometry.stride
        tokens = tokens.reshape(b, t // steps, h // patch, w // patch, -1)
        return TokenGrid(tokens, start=1 - stride, stride=stride)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        embeddings, _ = self.stock.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.text_tokens,
            device=self.device,
        )
        return {"encoder_hidden_states": embeddings}

    @torch.no_grad()
    def encode_video(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b m t h w"]:
        pixels = (video.to(self.device, self.vae_dtype) * 2 - 1).permute(0, 2, 1, 3, 4)
        return self.vae.encode(pixels).latent_dist.parameters

    def latents(
        self, moments: Float[Tensor, "b m t h w"], generator: torch.Generator
    ) -> Float[Tensor, "b f c h w"]:
        mean, log_variance = moments.float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        sample = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        centre, factor = (value.view(1, -1, 1, 1, 1).to(mean.device) for value in self._scaling)
        return ((sample - centre) * factor).permute(0, 2, 1, 3, 4)

    @cached_property
    def _scaling(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        return self.read_scaling()

    def read_scaling(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        """What is taken from a sample of the posterior, and what the rest is multiplied by, for
        each channel or for all."""
        config = self.spec.config("vae")
        centre = torch.tensor(config.get("latents_mean") or [0.0])
        spread = torch.tensor(config.get("latents_std") or [1.0])
        return centre, config.get("scaling_factor", 1.0) / spread

    def sample_timesteps(
        self, latents: Float[Tensor, "b f c h w"], generator: torch.Generator
    ) -> Num[Tensor, " b"]:
        return self.diffusion.sample_timesteps(len(latents), generator).to(self.device)

    def denoising_loss(
        self,
        latents: Float[Tensor, "b f c h w"],
        text: Text,
        noise: Float[Tensor, "b f c h w"],
        timestep: Num[Tensor, " b"],
    ) -> Denoised:
        noisy = self.diffusion.add_noise(latents, noise, timestep)
        output = self.transformer(**self.inputs(noisy, text, timestep), return_dict=False)[0]
        return self.diffusion.denoised(self.velocity(output, noisy), latents, noise, timestep)

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        embeddings = {
            name: value.to(self.dtype) if value.is_floating_point() else value
            for name, value in text.items()
        }
        latents = noisy.to(self.dtype).permute(0, 2, 1, 3, 4)
        return {"hidden_states": latents, "timestep": timestep} | embeddings

    def velocity(
        self, output: Tensor, noisy: Float[Tensor, "b f c h w"]
    ) -> Float[Tensor, "b f c h w"]:
        """The transformer's output as the velocity of a flow from latents to noise."""
        return output.permute(0, 2, 1, 3, 4)


def _tokenizer_of(text_encoder: str) -> str:
    return text_encoder.replace("text_encoder", "tokenizer")


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
