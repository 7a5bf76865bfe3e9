"""What Cosmos-Predict2 and 2.5 share: the transformer, Wan's autoencoder and how frames are shown.

A sampler of Predict2 counts noise as EDM does: x = z + s n. The transformer sees x / (1 + s), which
is the flow's (1 - t) z + t n at t = s / (1 + s), and so both are flows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import Backbone, BackboneSpec, Config, Part, Text
from videorepa.conditioning import Opening
from videorepa.diffusion import STEPS
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Generation

NEGATIVE_PROMPT = (
    "The video captures a series of frames showing ugly scenes, static with no motion, motion "
    "blur, over-saturation, shaky footage, low resolution, grainy texture, pixelated images, "
    "poorly lit areas, underexposed and overexposed scenes, poor color balance, washed out "
    "colors, choppy sequences, jerky movements, low frame rate, artifacting, color banding, "
    "unnatural transitions, outdated special effects, fake elements, unconvincing visuals, "
    "poorly edited content, jump cuts, visual noise, and flickering. Overall, the video is of "
    "poor quality."
)
"""The authors'; the stock pipelines' default as well."""

TWO_BILLION: Config = {
    "in_channels": 17,
    "num_attention_heads": 16,
    "rope_scale": (1.0, 3.0, 3.0),
    "extra_pos_embed_type": None,
}


class NoGuardrail:
    """Stands for NVIDIA's guardrail, without which the stock pipelines do not run: passes all."""

    def to(self, device: torch.device | str) -> None:
        """Do nothing, as there are no weights."""

    def check_text_safety(self, prompt: str) -> bool:
        """Let every prompt pass."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Give the frames back unchanged."""
        return frames


class CosmosBackbone(Backbone):
    """The live model: a mask among its channels says which latents it is shown, and these have a
    timestep of their own."""

    def __init__(
        self, spec: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        if "transformer" in parts:
            _check_torchvision()
        super().__init__(spec, parts, device, dtype)

    @property
    def vae_dtype(self) -> torch.dtype:
        # As for Wan, whose autoencoder it is.
        return torch.float32

    def components(self) -> Config:
        return super().components() | {"safety_checker": NoGuardrail()}

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        inputs = super().inputs(noisy, text, timestep)
        latents, pixels = inputs["hidden_states"], self.geometry.pixels
        count, _, frames, height, width = latents.shape
        share = (timestep.float() / STEPS).view(-1, 1, 1, 1, 1).expand(-1, 1, frames, 1, 1)
        return inputs | {
            # Float32 also where latents are not: bfloat16 has too few digits near 1.
            "timestep": share,
            "condition_mask": latents.new_zeros(count, 1, frames, height, width),
            "padding_mask": latents.new_zeros(1, 1, height * pixels, width * pixels),
        }

    def timestep_in(self, inputs: Config) -> Num[Tensor, " 1"]:
        return STEPS * super().timestep_in(inputs)

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        shown, mask = opening.mask(noisy).transpose(1, 2), inputs["condition_mask"]
        return inputs | {
            "timestep": torch.where(shown, self.spec.time_shown, inputs["timestep"]),
            "condition_mask": shown.to(mask.dtype).expand_as(mask),
        }

    def continuing(self, frames: Sequence[Any]) -> Config:
        return super().continuing(frames) if len(frames) == 1 else {"video": list(frames)}

    def sampling(self, size: ClipSize, settings: Generation) -> Config:
        # Left out, the stock pipelines would take a negative prompt of their own.
        arguments = super().sampling(size, settings)
        return arguments | {"negative_prompt": settings.negative_prompt}


class CosmosSpec(BackboneSpec):
    """A Cosmos-Predict pipeline, as a diffusers folder or a Hub id.

    Attributes:
      time_shown: The timestep of latents that are shown, 0 to 1, as in the stock pipeline.
    """

    live: ClassVar = CosmosBackbone
    transformer_class = "CosmosTransformer3DModel"
    vae_class = "AutoencoderKLWan"
    generation: ClassVar = {
        "steps": 35,
        "guidance_scale": 7.0,
        "dynamic_guidance": False,
        "negative_prompt": NEGATIVE_PROMPT,
        "fps": 16,
    }
    size: ClassVar = ClipSize(frames=93, height=704, width=1280)
    time_shown: ClassVar[float]

    @property
    def text_tokens(self) -> int:
        return 512

    def compression(self) -> tuple[int, int]:
        vae = self.config("vae")
        return vae["scale_factor_temporal"], vae["scale_factor_spatial"]


def _check_torchvision() -> None:
    from diffusers.models.transformers import transformer_cosmos

    if not hasattr(transformer_cosmos, "transforms"):
        raise UserError(
            "The transformer of Cosmos in diffusers resizes a mask with torchvision, which is not "
            "installed. Install the torchvision that fits this torch: pip install torchvision."
        )
