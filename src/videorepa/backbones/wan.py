"""Wan 2.1 and Wan 2.2 (arXiv 2503.20314), text or image to video, on unmodified classes.

Wan 2.2 A14B has two transformers: one for noise levels above a boundary and one for those below.
They share only the VAE and the text encoder. Each is trained in a run of its own, on the timesteps
of its side, and both runs use one cache. Sampling takes the other transformer as published.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from videorepa.backbones import Backbone, BackboneSpec, Config, Image, Text
from videorepa.conditioning import Conditioning, Opening
from videorepa.diffusion import FlowMatching
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Continuation
from videorepa.system.fingerprint import json_digest, weights_digest

NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，"
    "低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，"
    "毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
"""`sample_neg_prompt` in the authors' configuration, wan/configs/shared_config.py."""


TI2V_5B: Config = {"fps": 24}
"""What Wan 2.2 TI2V-5B is sampled with otherwise, as in the authors' configuration."""

I2V_A14B: Config = {"steps": 40, "guidance_scale": 3.5}
"""The same for Wan 2.2 I2V-A14B."""

GREY = 0.5
"""The pixels after the image in the clip that an image model's autoencoder sees."""

_IMAGE = "encoder_hidden_states_image"

_FROM_IMAGE = {"in_channels": 36}

_WITH_CLIP = _FROM_IMAGE | {"image_dim": 1280, "added_kv_proj_dim": 5120}


class WanBackbone(Backbone):
    """The live model: `transformer` is the expert that the recipe trains."""

    @cached_property
    def diffusion(self) -> FlowMatching:
        # Wan is trained on logit-normal timesteps.
        shift = self.scheduler.config.get("flow_shift") or self.scheduler.config["shift"]
        low, high = self.spec.noise_levels
        return FlowMatching(shift, logit_normal=True, low=low, high=high)

    @property
    def vae_dtype(self) -> torch.dtype:
        # As the stock pipeline's guide advises: the VAE's colours suffer in half precision.
        return torch.float32

    def components(self) -> Config:
        modules = super().components()
        return modules | {"transformer": None, "transformer_2": None, self.part: self.transformer}

    def pipeline(self, transformer: Any = None, from_image: bool = False) -> Any:
        stock = super().pipeline(transformer, from_image)
        for other in self.spec.parts[1:]:
            if getattr(stock, other) is None:
                with self.loading():
                    module = self.whole(self.spec.transformer_class, other, self.dtype)
                stock.register_modules(**{other: module})
        return stock

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        from diffusers import WanPipeline

        # The image pipeline's own fails without the package ftfy, and is the same with it.
        embeddings = WanPipeline._get_t5_prompt_embeds(
            self.stock,
            list(captions),
            max_sequence_length=self.spec.text_tokens,
            device=self.device,
        )
        return {"encoder_hidden_states": embeddings}

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        from diffusers.pipelines.wan.pipeline_wan import prompt_clean

        return super().count_tokens([prompt_clean(caption) for caption in captions])

    def blocks(self) -> Sequence[nn.Module]:
        return self.transformer.blocks

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        inputs = super().inputs(noisy, text, timestep)
        if self.spec.config("model_index")["expand_timesteps"]:
            # Wan 2.2 TI2V takes a timestep for every token; without an image all are equal.
            _, frames, _, height, width = noisy.shape
            tokens = frames * (height // self.geometry.patch) * (width // self.geometry.patch)
            inputs["timestep"] = timestep.float()[:, None].expand(-1, tokens)
        if not self._has_channels:
            return inputs
        latents = inputs["hidden_states"]
        blank = latents.new_zeros(len(latents), self._image_channels, *latents.shape[2:])
        image = {
            name: latents.new_zeros(len(latents), *like.shape)
            for name, like in self.spec.image_embeddings().items()
        }
        return inputs | {"hidden_states": torch.cat([latents, blank], 1), _IMAGE: None} | image

    @property
    def _has_channels(self) -> bool:
        return self.conditioning is not None and self.conditioning.place == "by channels"

    @property
    def _image_channels(self) -> int:
        """A mask of the frames that each latent covers, and the padded image's latents."""
        return self.geometry.frames + self.geometry.channels

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        embeddings = opening.image.get(_IMAGE)
        image = {_IMAGE: None if embeddings is None else embeddings.to(self.dtype)}
        if not self._has_channels:
            shown = self.shown_tokens(noisy, opening)
            return inputs | image | {"timestep": torch.where(shown, 0.0, inputs["timestep"])}
        clips, frames, _, height, width = noisy.shape
        mask = opening.mask(noisy)
        channels = mask.expand(clips, frames, self.geometry.frames, height, width)
        padded = torch.where(mask[:, :1], opening.image["image"], 0.0)
        latents = inputs["hidden_states"].clone()
        latents[:, -self._image_channels :] = torch.cat([channels, padded], 2).transpose(1, 2)
        return inputs | image | {"hidden_states": latents}

    @torch.no_grad()
    def encode_image(
        self,
        video: Float[Tensor, "b f 3 h w"],
        draws: Sequence[torch.Generator] | None = None,
    ) -> Image:
        if not self.spec.image_channels():
            return {}
        padded = torch.full_like(video, GREY)
        padded[:, :1] = video[:, :1]
        mean, _ = self.encode_video(padded).chunk(2, dim=1)
        image = {"image": mean}
        if self.spec.image_encoders():
            from diffusers import WanImageToVideoPipeline
            from PIL.Image import fromarray

            frames = (video[:, 0] * 255.0).round().byte().permute(0, 2, 3, 1).cpu().numpy()
            # One by one, as the stock pipeline takes them.
            image[_IMAGE] = torch.cat(
                [
                    WanImageToVideoPipeline.encode_image(self.stock, fromarray(frame), self.device)
                    for frame in frames
                ]
            )
        return image

    def image(
        self,
        stored: Image,
        moments: Float[Tensor, "b m t h w"],
        generator: torch.Generator | None,
    ) -> Image:
        if self._has_channels:
            no_variance = torch.zeros_like(stored["image"])
            moments = torch.cat([stored["image"], no_variance], dim=1)
            return stored | {"image": self.latents(moments, None)}
        # The posterior's mode, as in the stock pipeline.
        return {"latents": self.latents(moments[:, :, :1], None)}


class Wan(BackboneSpec):
    """A Wan text-to-video pipeline, as a diffusers folder or a Hub id.

    Args:
      expert: Which of Wan 2.2's two transformers to train: "high" for high noise, which lays out
        the scene and its motion, or "low". Models with one transformer take "high".
    """

    live: ClassVar = WanBackbone
    pipeline_class = "WanPipeline"
    image_pipeline = "WanImageToVideoPipeline"
    transformer_class = "WanTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    text_encoders: ClassVar = {"text_encoder": "UMT5EncoderModel"}
    text_width = "text_dim"
    options: ClassVar = ("boundary_ratio", "expand_timesteps")
    generation: ClassVar = {
        "guidance_scale": 5.0,
        "dynamic_guidance": False,
        "negative_prompt": NEGATIVE_PROMPT,
        "fps": 16,
    }
    published: ClassVar = {
        "Wan2.1-T2V-1.3B-Diffusers": {
            "transformer": {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960}
        },
        "Wan2.1-T2V-14B-Diffusers": {},
        "Wan2.2-T2V-A14B-Diffusers": {"model_index": {"boundary_ratio": 0.875}},
        "Wan2.1-I2V-14B-480P-Diffusers": {"transformer": _WITH_CLIP},
        "Wan2.1-I2V-14B-720P-Diffusers": {"transformer": _WITH_CLIP},
        "Wan2.2-I2V-A14B-Diffusers": {
            "transformer": _FROM_IMAGE,
            "model_index": {"boundary_ratio": 0.9},
        },
        "Wan2.2-TI2V-5B-Diffusers": {
            "model_index": {"expand_timesteps": True},
            "transformer": {
                "in_channels": 48,
                "out_channels": 48,
                "num_attention_heads": 24,
                "num_layers": 30,
                "ffn_dim": 14336,
            },
            "vae": {"z_dim": 48, "scale_factor_spatial": 16},
        },
    }
    size: ClassVar = ClipSize(frames=81, height=480, width=832)

    name: Literal["wan"] = "wan"
    expert: Literal["high", "low"] = "high"

    @property
    def text_tokens(self) -> int:
        return 512

    @property
    def parts(self) -> tuple[str, ...]:
        """Folders of the transformers: the one that the recipe trains, then the other, if any.

        Raises:
          UserError: The recipe asks for the low-noise expert of a model with one transformer.
        """
        if self.config("model_index")["boundary_ratio"] is not None:
            both = ("transformer", "transformer_2")
            return both if self.expert == "high" else both[::-1]
        if self.expert == "low":
            raise UserError(
                f"{self.weights} has one transformer; leave out backbone.expert, or take a Wan 2.2 "
                "A14B folder, which has two."
            )
        return ("transformer",)

    @property
    def part(self) -> str:
        return self.parts[0]

    @property
    def expert_name(self) -> str:
        return f"{self.expert}-noise expert" if len(self.parts) > 1 else ""

    @property
    def noise_levels(self) -> tuple[float, float]:
        """Lowest and highest sigma at which the pipeline uses the trained transformer."""
        if len(self.parts) == 1:
            return 0.0, 1.0
        boundary = self.config("model_index")["boundary_ratio"]
        return (boundary, 1.0) if self.expert == "high" else (0.0, boundary)

    def image_channels(self) -> int:
        """Channels of the transformer's input beside the latents'."""
        return self.config("transformer")["in_channels"] - self.geometry().channels

    def conditioning(self) -> Conditioning | None:
        # As in the public trainers; the authors have published none.
        always = Continuation(latents=(1,), probability=1.0, dropout=0.0)
        if self.image_channels():
            return Conditioning("by channels", always, is_required=True)
        if self.config("model_index")["expand_timesteps"]:
            return Conditioning("in place", always)
        return None

    def image_encoders(self) -> dict[str, str]:
        has_one = self.config("transformer")["image_dim"] is not None
        return {"image_encoder": "CLIPVisionModel"} if has_one else {}

    def image_embeddings(self) -> Image:
        """CLIP's tokens of one image, on the meta device."""
        if not self.image_encoders():
            return {}
        config = self.config("image_encoder")
        side = config.get("image_size", 224) // config.get("patch_size", 14)
        size = side**2 + 1, self.config("transformer")["image_dim"]
        return {_IMAGE: torch.empty(size, dtype=torch.bfloat16, device="meta")}

    def image(self, size: ClipSize) -> Image:
        if not self.image_channels():
            return {}
        channels, *rest = self.moments(size)
        mean = torch.empty(channels // 2, *rest, dtype=torch.float16, device="meta")
        return {"image": mean} | self.image_embeddings()

    def published_generation(self) -> Config:
        settings = super().published_generation()
        if not self.has_config:
            return settings
        with self.described():
            index = self.config("model_index")
            if index["expand_timesteps"]:
                return settings | TI2V_5B
            if index["boundary_ratio"] is not None and self.takes_image:
                return settings | I2V_A14B
        return settings

    def check_clip(self, size: ClipSize) -> None:
        super().check_clip(size)
        _ = self.parts  # Raises for an expert that the model does not have.

    def compression(self) -> tuple[int, int]:
        vae = self.config("vae")
        return vae["scale_factor_temporal"], vae["scale_factor_spatial"]

    def weights_digest(self) -> str:
        return json_digest([weights_digest(self.folder() / part) for part in sorted(self.parts)])
