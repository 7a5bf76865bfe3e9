"""Mochi 1, text to video, on unmodified diffusers classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import TWO_STREAMS, Backbone, BackboneSpec, Config, Text
from videorepa.diffusion import STEPS, FlowMatching
from videorepa.settings.sections import ClipSize


class MochiBackbone(Backbone):
    """The live model: its time runs from noise to latents, timestep and velocity reversed."""

    @cached_property
    def diffusion(self) -> FlowMatching:
        # Timesteps are uniform, as in the authors' fine-tuner.
        return FlowMatching()

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

    def timestep_in(self, inputs: Config) -> Num[Tensor, " 1"]:
        return STEPS - super().timestep_in(inputs)

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
    text_mask = True
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

    def compression(self) -> tuple[int, int]:
        vae = self.config("vae")
        return math.prod(vae["temporal_expansions"]), math.prod(vae["spatial_expansions"])
