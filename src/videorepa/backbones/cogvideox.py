"""CogVideoX 1.0 and 1.5 (arXiv 2408.06072), any size, on unmodified diffusers classes."""

from __future__ import annotations

from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import Backbone, BackboneSpec, Config, Text
from videorepa.diffusion import VPrediction
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.hub import micro_weights

_FIVE_BILLION = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}


class CogVideoXBackbone(Backbone):
    """The live model: its transformer takes latents (B, F, C, H, W) and predicts v, no flow."""

    @cached_property
    def diffusion(self) -> VPrediction:
        return VPrediction(self.scheduler.alphas_cumprod)

    def scheduler_class(self) -> tuple[str, Config]:
        return "CogVideoXDPMScheduler", {"timestep_spacing": "trailing"}

    def latents(
        self, moments: Float[Tensor, "b m t h w"], generator: torch.Generator | None
    ) -> Float[Tensor, "b f c h w"]:
        latents = super().latents(moments, generator)
        # Tokens of 1.5 span two latents. As in the authors' training, the first latent is repeated
        # in front to fill the first token. The pipeline pads there too and drops it to decode.
        padding = -latents.shape[1] % self.geometry.steps
        return torch.cat([latents[:, :1].expand(-1, padding, -1, -1, -1), latents], dim=1)

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        return super().inputs(noisy, text, timestep) | {
            "hidden_states": noisy.to(self.dtype),
            "image_rotary_emb": self._rotary(noisy),
        }

    def velocity(
        self, output: Tensor, noisy: Float[Tensor, "b f c h w"]
    ) -> Float[Tensor, "b f c h w"]:
        return output

    def _rotary(self, latents: Tensor) -> tuple[Tensor, Tensor] | None:
        if not self.transformer.config.use_rotary_positional_embeddings:
            return None
        # Training positions must equal those that the pipeline samples with. Without a VAE the
        # pipeline assumes the published VAE's scale.
        scale = self.stock.vae_scale_factor_spatial
        _, frames, _, height, width = latents.shape
        return self.stock._prepare_rotary_positional_embeddings(
            height * scale, width * scale, frames, latents.device
        )

    def sampling(self, size: ClipSize, settings: Generation) -> dict[str, Any]:
        return super().sampling(size, settings) | {"use_dynamic_cfg": settings.dynamic_guidance}


class CogVideoX(BackboneSpec):
    """A CogVideoX pipeline, as a diffusers folder, a Hub id or "micro", the lab's own model."""

    live: ClassVar = CogVideoXBackbone
    pipeline_class = "CogVideoXPipeline"
    transformer_class = "CogVideoXTransformer3DModel"
    vae_class = "AutoencoderKLCogVideoX"
    text_encoders: ClassVar = {"text_encoder": "T5EncoderModel"}
    published: ClassVar = {
        "CogVideoX-2b": {},
        "CogVideoX-5b": {"transformer": _FIVE_BILLION, "vae": {"scaling_factor": 0.7}},
        "CogVideoX1.5-5B": {
            "transformer": _FIVE_BILLION
            | {
                "patch_size_t": 2,
                "patch_bias": False,
                "sample_height": 300,
                "sample_width": 300,
                "sample_frames": 81,
            },
            "vae": {"scaling_factor": 0.7},
        },
    }

    name: Literal["cogvideox"] = "cogvideox"

    @property
    def source(self) -> str:
        return str(micro_weights(self.name)) if self.weights == "micro" else self.weights

    @property
    def text_tokens(self) -> int:
        return self.config("transformer")["max_text_seq_length"]

    def compression(self) -> tuple[int, int]:
        vae = self.config("vae")
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)
        return int(vae["temporal_compression_ratio"]), pixels

    def default_size(self) -> ClipSize:
        config, geometry = self.config("transformer"), self.geometry()
        if geometry.steps > 1:
            # The size in 1.5's configuration is the range of its positions.
            return ClipSize(frames=config["sample_frames"], height=768, width=1360)
        return ClipSize(
            frames=config["sample_frames"],
            height=config["sample_height"] * geometry.pixels,
            width=config["sample_width"] * geometry.pixels,
        )
