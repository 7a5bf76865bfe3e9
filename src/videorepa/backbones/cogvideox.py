"""CogVideoX 1.0 and 1.5 (arXiv 2408.06072), text or image to video, on unmodified classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import Backbone, BackboneSpec, Config, Image, Text
from videorepa.backbones._micro import FROM_IMAGE, image_model
from videorepa.conditioning import Conditioning, Opening
from videorepa.diffusion import VPrediction
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Continuation, Generation
from videorepa.system.hub import micro_weights

_FIVE_BILLION = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}

_ONE_AND_A_HALF = {
    "patch_size_t": 2,
    "patch_bias": False,
    "sample_height": 300,
    "sample_width": 300,
    "sample_frames": 81,
}

IMAGE_NOISE = (-3.0, 0.5)
"""Mean and spread of the logarithm of the noise in images, whose pixels run from -1 to 1, as in
the authors' SAT trainer. They draw it anew at each step, here each clip has one, as its image is
encoded once."""

OFS = 2.0
"""What 1.5's image model is told, always; the stock pipeline and the authors' sampler have it."""


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
        inputs = super().inputs(noisy, text, timestep) | {
            "hidden_states": noisy.to(self.dtype),
            "image_rotary_emb": self._rotary(noisy),
        }
        if self.conditioning is None:
            return inputs
        latents = inputs["hidden_states"]
        has_ofs = self.spec.config("transformer")["ofs_embed_dim"] is not None
        return inputs | {
            "hidden_states": torch.cat([latents, torch.zeros_like(latents)], dim=2),
            "ofs": latents.new_full((1,), OFS) if has_ofs else None,
        }

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        channels, latents = noisy.shape[2], inputs["hidden_states"].clone()
        # Of 1.5's two first latents, which are one frame, the image stands beside the first.
        image = torch.where(opening.mask(noisy)[:, :1], opening.image["image"], 0.0)
        latents[:, :1, channels:] = image.to(latents.dtype)
        return inputs | {"hidden_states": latents}

    @torch.no_grad()
    def encode_image(
        self,
        video: Float[Tensor, "b f 3 h w"],
        draws: Sequence[torch.Generator] | None = None,
    ) -> Image:
        # Encoded alone, since the norms of a clip's encoding see all of its frames.
        images = video[:, :1]
        if draws is not None:
            mean, spread = IMAGE_NOISE
            noises = []
            for draw in draws:
                sigma = (mean + spread * torch.randn((), generator=draw)).exp()
                noises.append(sigma * torch.randn(images.shape[1:], generator=draw))
            images = images + torch.stack(noises).to(images) / 2  # Pixels run from 0 to 1 here.
        return {"image": self.encode_video(images)}

    def image(
        self,
        stored: Image,
        moments: Float[Tensor, "b m t h w"],
        generator: torch.Generator | None,
    ) -> Image:
        image = super().latents(stored["image"], generator)
        vae = self.spec.config("vae")
        if vae["invert_scale_latents"]:
            # 1.5 was trained with images at the inverse scale, says the stock pipeline.
            image = image / vae["scaling_factor"] ** 2
        return {"image": image}

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
    """A CogVideoX pipeline, as a diffusers folder or a Hub id, or one of the lab's own models:
    "micro", from text, and "micro-i2v", from an image."""

    live: ClassVar = CogVideoXBackbone
    pipeline_class = "CogVideoXPipeline"
    image_pipeline = "CogVideoXImageToVideoPipeline"
    transformer_class = "CogVideoXTransformer3DModel"
    vae_class = "AutoencoderKLCogVideoX"
    text_encoders: ClassVar = {"text_encoder": "T5EncoderModel"}
    published: ClassVar = {
        "CogVideoX-2b": {},
        "CogVideoX-5b": {"transformer": _FIVE_BILLION, "vae": {"scaling_factor": 0.7}},
        "CogVideoX1.5-5B": {
            "transformer": _FIVE_BILLION | _ONE_AND_A_HALF,
            "vae": {"scaling_factor": 0.7},
        },
        "CogVideoX-5b-I2V": {
            "transformer": _FIVE_BILLION
            | {"in_channels": 32, "use_learned_positional_embeddings": True},
            "vae": {"scaling_factor": 0.7},
        },
        "CogVideoX1.5-5B-I2V": {
            "transformer": _FIVE_BILLION
            | _ONE_AND_A_HALF
            | {"in_channels": 32, "ofs_embed_dim": 512},
            "vae": {"scaling_factor": 0.7, "invert_scale_latents": True},
        },
    }

    name: Literal["cogvideox"] = "cogvideox"

    @property
    def source(self) -> str:
        if self.weights == FROM_IMAGE:
            return str(image_model())
        return str(micro_weights(self.name)) if self.weights == "micro" else self.weights

    @property
    def text_tokens(self) -> int:
        return self.config("transformer")["max_text_seq_length"]

    def compression(self) -> tuple[int, int]:
        vae = self.config("vae")
        pixels = 2 ** (len(vae["block_out_channels"]) - 1)
        return int(vae["temporal_compression_ratio"]), pixels

    def conditioning(self) -> Conditioning | None:
        config = self.config("transformer")
        if config["in_channels"] == self.geometry().channels:
            return None
        trained = Continuation(latents=(1,), probability=1.0, dropout=0.05)
        return Conditioning("by channels", trained, is_required=True, has_blank=True)

    def image(self, size: ClipSize) -> Image:
        if self.conditioning() is None:
            return {}
        moments = self.moments(size.model_copy(update={"frames": 1}))
        return {"image": torch.empty(moments, dtype=torch.float16, device="meta")}

    def image_fingerprint(self) -> dict[str, str]:
        return super().image_fingerprint() | {"noise": str(IMAGE_NOISE)}

    def check_clip(self, size: ClipSize) -> None:
        super().check_clip(size)
        if not self._has_learned_positions:
            return
        # Other sides raise in the stock class; other lengths get positions that were not trained.
        made_for = self.default_size()
        sides, theirs = (f"{clip.height}x{clip.width}" for clip in (size, made_for))
        if sides != theirs:
            raise UserError(
                f"{self.weights} has learned positions of {theirs} alone; the recipe asks for "
                f"{sides}. Try {theirs}."
            )
        if size.frames != made_for.frames:
            raise UserError(
                f"{self.weights} has learned positions of {made_for.frames} frames alone; the "
                f"recipe asks for {size.frames}. Try {made_for.frames}."
            )

    @property
    def _has_learned_positions(self) -> bool:
        return self.config("transformer")["use_learned_positional_embeddings"]

    def least_size(self) -> ClipSize:
        return self.sampled_size(super().least_size())

    def sampled_size(self, size: ClipSize) -> ClipSize:
        return self.default_size() if self._has_learned_positions else size

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
