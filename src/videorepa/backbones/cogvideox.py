"""CogVideoX, any size, from a diffusers folder and on unmodified diffusers classes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from videorepa.backbones import Backbone, BackboneShapes, BackboneSpec, Part, add_lora
from videorepa.data.fingerprint import json_digest, weights_digest
from videorepa.diffusion import Denoised, VPrediction
from videorepa.errors import UserError
from videorepa.hub import local_copy, quieten_libraries
from videorepa.recipe import ClipSize, Lora
from videorepa.tokens import TokenGrid

# What inspect needs to know of the published checkpoints when they are not on this machine.
_VAE = {"block_out_channels": [128, 256, 256, 512], "latent_channels": 16}
PUBLISHED: dict[str, dict[str, dict[str, Any]]] = {
    "CogVideoX-2b": {"transformer": {"num_attention_heads": 30, "num_layers": 30}, "vae": _VAE},
    "CogVideoX-5b": {
        "transformer": {
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
        "vae": _VAE,
    },
}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "transformer": {
        "attention_head_dim": 64,
        "in_channels": 16,
        "patch_size": 2,
        "patch_size_t": None,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 226,
        "text_embed_dim": 4096,
        "sample_frames": 49,
        "sample_height": 60,
        "sample_width": 90,
    },
    "vae": {"temporal_compression_ratio": 4},
}


class CogVideoX(BackboneSpec):
    """A CogVideoX pipeline, as a diffusers folder, a Hub id or "micro"."""

    name: Literal["cogvideox"] = "cogvideox"

    @property
    def source(self) -> str:
        if self.weights == "micro":
            from videorepa.lab import micro_weights

            return str(micro_weights("cogvideox"))
        return self.weights

    def config(self, part: Part) -> dict[str, Any]:
        """The part's configuration: from its folder, else as published, else from the Hub."""
        values = _read_config(self.source, part)
        if part == "transformer" and values.get("patch_size_t") is not None:
            raise UserError(
                f"{self.weights} is a CogVideoX 1.5 model (patch_size_t is set); this backbone "
                "handles CogVideoX 1.0 checkpoints such as zai-org/CogVideoX-2b and -5b."
            )
        return _DEFAULTS.get(part, {}) | values

    def check_clip(self, size: ClipSize) -> None:
        frames, height, width = size.frames, size.height, size.width
        t = self.config("vae")["temporal_compression_ratio"]
        unit = self._pixels_per_latent * self.config("transformer")["patch_size"]
        if (frames - 1) % t:
            near = max(1, round((frames - 1) / t)) * t + 1
            raise UserError(
                f"CogVideoX takes 1 + {t}k frames; the recipe asks for {frames}. Try {near}."
            )
        if height % unit or width % unit:
            sizes = [max(unit, round(side / unit) * unit) for side in (height, width)]
            raise UserError(
                f"{self.weights} takes heights and widths that are multiples of {unit}; the recipe "
                f"asks for {height}x{width}. Try {sizes[0]}x{sizes[1]}."
            )

    @property
    def _pixels_per_latent(self) -> int:
        return 2 ** (len(self.config("vae")["block_out_channels"]) - 1)

    def shapes(self, size: ClipSize) -> BackboneShapes:
        self.check_clip(size)
        frames, height, width = size.frames, size.height, size.width
        config, vae = self.config("transformer"), self.config("vae")
        ratio = vae["temporal_compression_ratio"]
        steps = (frames - 1) // ratio + 1
        h, w = height // self._pixels_per_latent, width // self._pixels_per_latent
        channels = config["num_attention_heads"] * config["attention_head_dim"]
        patch = config["patch_size"]
        grid = torch.empty(1, steps, h // patch, w // patch, channels, device="meta")
        model = self._on_meta()
        return BackboneShapes(
            latents=(steps, config["in_channels"], h, w),
            text=(config["max_text_seq_length"], config["text_embed_dim"]),
            grid=TokenGrid(grid, start=1 - ratio, stride=ratio),
            blocks=config["num_layers"],
            parameters=sum(p.numel() for p in model.parameters()),
        )

    def _on_meta(self) -> Any:
        from diffusers import CogVideoXTransformer3DModel

        with torch.device("meta"):
            return CogVideoXTransformer3DModel.from_config(self.config("transformer"))

    def lora_parameters(self, lora: Lora) -> int:
        with torch.device("meta"):
            model = self._on_meta()
            add_lora(model, lora)
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    def fingerprint(self) -> dict[str, str]:
        # The scaling factor is left out: moments are stored unscaled, and 2B and 5B share a VAE.
        vae = self.config("vae")
        kept = {k: v for k, v in vae.items() if k in ("block_out_channels", "latent_channels")}
        source = _require(self.source)
        return {
            "vae": json_digest(kept) + weights_digest(source / "vae"),
            "text_encoder": weights_digest(source / "text_encoder"),
            "tokenizer": weights_digest(source / "tokenizer"),
            "text_tokens": str(self.config("transformer")["max_text_seq_length"]),
        }

    def weights_digest(self) -> str:
        return weights_digest(_require(self.source) / "transformer")

    def default_size(self) -> ClipSize:
        config, scale = self.config("transformer"), self._pixels_per_latent
        return ClipSize(
            frames=config["sample_frames"],
            height=config["sample_height"] * scale,
            width=config["sample_width"] * scale,
        )

    def load(
        self, parts: Sequence[Part], device: torch.device, dtype: torch.dtype = torch.float32
    ) -> CogVideoXBackbone:
        return CogVideoXBackbone(self, parts, device, dtype)


class CogVideoXBackbone(Backbone):
    """The live model; parts that were not asked for are None."""

    def __init__(
        self, spec: CogVideoX, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        from diffusers import (
            AutoencoderKLCogVideoX,
            CogVideoXDPMScheduler,
            CogVideoXPipeline,
            CogVideoXTransformer3DModel,
        )
        from transformers import AutoTokenizer, T5EncoderModel

        quieten_libraries()
        is_skeleton = device.type == "meta"
        source = Path() if is_skeleton else _require(spec.source)
        vae: Any = None
        text_encoder: Any = None
        tokenizer: Any = None
        transformer: Any = None
        with _loading(spec.weights):
            if "vae" in parts:
                vae = _whole(AutoencoderKLCogVideoX, source, "vae", torch_dtype=dtype).to(device)
            if "text_encoder" in parts:
                tokenizer = AutoTokenizer.from_pretrained(source, subfolder="tokenizer")
                text_encoder = _whole(T5EncoderModel, source, "text_encoder", dtype=dtype).to(
                    device
                )
            if "transformer" in parts and is_skeleton:
                transformer = spec._on_meta().to(dtype)
            elif "transformer" in parts:
                transformer = _whole(
                    CogVideoXTransformer3DModel, source, "transformer", torch_dtype=dtype
                ).to(device)
            if is_skeleton:
                scheduler: Any = CogVideoXDPMScheduler()
            else:
                scheduler = CogVideoXDPMScheduler.from_pretrained(
                    source, subfolder="scheduler", timestep_spacing="trailing"
                )
        for module in (vae, text_encoder, transformer):
            if module is not None:
                module.eval().requires_grad_(False)
        self.spec, self.device, self.dtype = spec, device, dtype
        self.transformer = transformer
        self._pipeline = CogVideoXPipeline(tokenizer, text_encoder, vae, transformer, scheduler)
        self._pipeline.vae_scale_factor_spatial = spec._pixels_per_latent
        self._vae_config = spec.config("vae")
        self.diffusion = VPrediction(scheduler.alphas_cumprod)

    def block(self, number: int) -> nn.Module:
        blocks = self.transformer.transformer_blocks
        if not 1 <= number <= len(blocks):
            raise UserError(
                f"align.block is {number}, counted from 1; {self.spec.weights} has {len(blocks)} "
                "blocks."
            )
        return blocks[number - 1]

    def grid(self, output: Any, latents: Float[Tensor, "b f c h w"]) -> TokenGrid:
        video_tokens = output[0]
        b, t, _, h, w = latents.shape
        patch = self.transformer.config.patch_size
        ratio = self._vae_config["temporal_compression_ratio"]
        tokens = video_tokens.reshape(b, t, h // patch, w // patch, -1)
        return TokenGrid(tokens, start=1 - ratio, stride=ratio)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Float[Tensor, "b l d"]:
        return self._pipeline._get_t5_prompt_embeds(
            list(captions),
            max_sequence_length=self.spec.config("transformer")["max_text_seq_length"],
            device=self.device,
        )

    @torch.no_grad()
    def encode_video(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b m t h w"]:
        pixels = (video.to(self.device, self.dtype) * 2 - 1).permute(0, 2, 1, 3, 4)
        return self._pipeline.vae.encode(pixels).latent_dist.parameters

    def latents(
        self, moments: Float[Tensor, "b m t h w"], generator: torch.Generator
    ) -> Float[Tensor, "b f c h w"]:
        mean, log_variance = moments.float().chunk(2, dim=1)
        noise = torch.randn(mean.shape, generator=generator).to(mean.device)
        sample = mean + (0.5 * log_variance.clamp(-30, 20)).exp() * noise
        factor = self._vae_config.get("scaling_factor", 1.15258426)
        if self._vae_config.get("invert_scale_latents", False):
            factor = 1 / factor
        return (sample * factor).permute(0, 2, 1, 3, 4)

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Int[Tensor, " b"]:
        return self.diffusion.sample_timesteps(count, generator).to(self.device)

    def denoising_loss(
        self,
        latents: Float[Tensor, "b f c h w"],
        text: Float[Tensor, "b l d"],
        noise: Float[Tensor, "b f c h w"],
        timestep: Int[Tensor, " b"],
    ) -> Denoised:
        noisy = self.diffusion.add_noise(latents, noise, timestep)
        velocity = self.transformer(**self.inputs(noisy, text, timestep), return_dict=False)[0]
        return self.diffusion.denoised(velocity, noisy, latents, timestep)

    def inputs(
        self,
        noisy: Float[Tensor, "b f c h w"],
        text: Float[Tensor, "b l d"],
        timestep: Int[Tensor, " b"],
    ) -> dict[str, Any]:
        return {
            "hidden_states": noisy.to(self.dtype),
            "encoder_hidden_states": text.to(self.dtype),
            "timestep": timestep,
            "image_rotary_emb": self._rotary(noisy),
        }

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        config = self.transformer.config
        if not config.use_rotary_positional_embeddings:
            return None
        scale = self._pipeline.vae_scale_factor_spatial
        _, frames, _, height, width = latents.shape
        # The pipeline's own tables: positions must be those it samples with.
        return self._pipeline._prepare_rotary_positional_embeddings(
            height * scale, width * scale, frames, latents.device
        )

    def pipeline(self) -> Any:
        return self._pipeline


@cache
def _read_config(source: str, part: str) -> dict[str, Any]:
    folder = Path(source)
    if folder.is_dir():
        _check_model_index(folder)
        path = folder / part / "config.json"
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"{source} has no {part}/config.json; is it a diffusers folder?"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path} cannot be read as JSON: {error}") from None
    published = PUBLISHED.get(source.rsplit("/", 1)[-1])
    if published and part in published:
        return published[part]
    return _read_config(str(_require(source)), part)


def _check_model_index(folder: Path) -> None:
    index = folder / "model_index.json"
    try:
        found = json.loads(index.read_text(encoding="utf-8")).get("_class_name")
    except FileNotFoundError:
        raise UserError(
            f"{folder} has no model_index.json; expected a diffusers CogVideoX pipeline folder."
        ) from None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{index} cannot be read as a pipeline's index: {error}") from None
    if found != "CogVideoXPipeline":
        raise UserError(
            f"{folder} holds a {found}; the backbone cogvideox loads a CogVideoXPipeline."
        )


def _require(source: str) -> Path:
    folder = local_copy(source)
    _check_model_index(folder)
    return folder


@contextmanager
def _loading(name: str):
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The model {name} could not be loaded: {type(error).__name__}: {str(error)[:500]}. "
            "Compare the folder with the one it was copied from."
        ) from None


def _whole(kind: Any, source: Path, part: Part, **options: Any) -> Any:
    """A part of the pipeline with every weight found in its folder: left to themselves, diffusers
    and transformers make up those that are missing."""
    model, found = kind.from_pretrained(source, subfolder=part, output_loading_info=True, **options)
    if missing := sorted(found["missing_keys"]):
        raise UserError(
            f"{source / part} lacks {len(missing)} of the model's weights, such as "
            f"{', '.join(missing[:4])}. Copy or download the folder again."
        )
    return model
