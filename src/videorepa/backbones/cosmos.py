"""Cosmos-Predict2 Video2World (arXiv 2501.03575), which continues frames, on unmodified classes."""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import Config, Text
from videorepa.backbones._cosmos import TWO_BILLION, CosmosBackbone, CosmosSpec
from videorepa.conditioning import Conditioning
from videorepa.diffusion import STEPS, FlowMatching
from videorepa.settings.sections import ClipSize, Continuation, Generation

RARE = 0.05
"""Share of samples in training that are nearly noise alone."""

RARE_SIGMA = (200.0, 1e5)
"""Their noise as EDM counts it, from and to; its logarithm is uniform."""

SIGMA_SHOWN = 1e-4
"""The noise, as EDM counts it, that the model is told of latents that it is shown."""

BASE_FPS = 24
"""The frame rate at which positions in time are the latents' numbers. The authors train with these,
whatever a clip's rate; the stock pipeline's default, 16, would stretch them."""


class Cosmos2Backbone(CosmosBackbone):
    """The live model of Predict2."""

    @cached_property
    def diffusion(self) -> FlowMatching:
        # The authors draw EDM's noise as sqrt(24) exp(N(0, 1)).
        return FlowMatching(shift=math.sqrt(24), logit_normal=True)

    def scheduler_about(self) -> Config:
        _ = self.stock  # It tells the scheduler its range of noise.
        return super().scheduler_about()

    def sample_timesteps(
        self, latents: Float[Tensor, "b f c h w"], generator: torch.Generator
    ) -> Num[Tensor, " b"]:
        usual = self.diffusion.sample_timesteps(len(latents), generator)
        rare, place = torch.rand(2, len(latents), generator=generator, dtype=torch.float64)
        low, high = RARE_SIGMA
        sigma = low * (high / low) ** place
        noise = (STEPS * sigma / (1 + sigma)).float()
        return torch.where(rare < RARE, noise, usual).to(self.device)

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        return super().inputs(noisy, text, timestep) | {"fps": BASE_FPS}

    def sampling(self, size: ClipSize, settings: Generation) -> dict[str, Any]:
        return super().sampling(size, settings) | {"fps": BASE_FPS}


class Cosmos(CosmosSpec):
    """A Cosmos-Predict2 Video2World pipeline, as a diffusers folder or a Hub id."""

    live: ClassVar = Cosmos2Backbone
    pipeline_class = "Cosmos2VideoToWorldPipeline"
    image_pipeline = pipeline_class
    text_encoders: ClassVar = {"text_encoder": "T5EncoderModel"}
    published: ClassVar = {
        "Cosmos-Predict2-2B-Video2World": {"transformer": TWO_BILLION},
        "Cosmos-Predict2-14B-Video2World": {
            "transformer": TWO_BILLION
            | {"num_attention_heads": 40, "num_layers": 36, "rope_scale": (20 / 24, 2.0, 2.0)}
        },
    }
    time_shown: ClassVar = SIGMA_SHOWN / (1 + SIGMA_SHOWN)

    name: Literal["cosmos"] = "cosmos"

    @property
    def lora_pipeline(self) -> str:
        # The pipeline of Predict2 cannot load LoRA files in diffusers 0.42; that of 2.5 can.
        return "Cosmos2_5_PredictBasePipeline"

    def conditioning(self) -> Conditioning:
        trained = Continuation(latents=(1, 2), probability=1.0, dropout=0.0)
        return Conditioning("in place", trained, most=2, is_required=True)
