"""Mochi 1, text to video, on unmodified diffusers classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import TWO_STREAMS, Backbone, BackboneSpec, Config, Geometry, Text
from videorepa.diffusion import STEPS, FlowMatching
from videorepa.settings.sections import ClipSize


class MochiBackbone(Backbone):
    """The live model: its time runs from noise to latents, timestep and velocity reversed."""

    # Timesteps are uniform, as in the authors' fine-tuner.
    diffusion = FlowMatching()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        # One by one, because the pipeline takes a batch that ends with an empty caption for empty.
        encoded = [
            self.stock.encode_prompt(
                caption,
                do_classifier_free_guidance=False,
                max_sequence_length=self.spec.text_tokens,
                device=self.device,
            )
            for caption in captions
        ]
        return {
            "encoder_hidden_states": torch.cat([embeddings for embeddings, *_ in encoded]),
            "encoder_attention_mask": torch.cat([mask for _, mask, *_ in encoded]),
        }

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        return super().inputs(noisy, text, STEPS - timestep)

    def velocity(
        self, output: Tensor, noisy: Float[Tensor, "b f c h w"]
    ) -> Float[Tensor, "b f c h w"]:
        return -super().velocity(output, noisy)


class Mochi(BackboneSpec):
    """A Mochi pipeline, as a diffusers folder or a Hub id."""

    live: ClassVar = MochiBackbone
    pipeline_class = "MochiPipeline"
    transformer_class = "MochiTransformer3DModel"
    vae_class = "AutoencoderKLMochi"
    text_encoders: ClassVar = {"text_encoder": "T5EncoderModel"}
    options: ClassVar = ("force_zeros_for_empty_prompt",)
    lora_targets: ClassVar = TWO_STREAMS
    generation: ClassVar = {
        "steps": 64,
        "guidance_scale": 4.5,
        "dynamic_guidance": False,
        "fps": 30,
    }
    published: ClassVar = {"mochi-1-preview": {}}
    size: ClassVar = ClipSize(frames=163, height=480, width=848)

    name: Literal["mochi"] = "mochi"

    @property
    def text_tokens(self) -> int:
        return 256

    def geometry(self) -> Geometry:
        transformer, vae = self.config("transformer"), self.config("vae")
        return Geometry(
            frames=math.prod(vae["temporal_expansions"]),
            pixels=math.prod(vae["spatial_expansions"]),
            patch=transformer["patch_size"],
            channels=transformer["in_channels"],
            width=transformer["num_attention_heads"] * transformer["attention_head_dim"],
            blocks=transformer["num_layers"],
        )

    def text(self) -> Text:
        tokens, width = self.text_tokens, self.config("transformer")["text_embed_dim"]
        return {
            "encoder_hidden_states": torch.empty(tokens, width, device="meta"),
            "encoder_attention_mask": torch.empty(tokens, dtype=torch.bool, device="meta"),
        }
