"""LTX-Video (arXiv 2501.00103), text or image to video, on unmodified diffusers classes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from safetensors import safe_open
from torch import Tensor

from videorepa.backbones import Backbone, BackboneSpec, Config, Text
from videorepa.conditioning import Conditioning, Opening
from videorepa.diffusion import FlowMatching
from videorepa.errors import UserError
from videorepa.settings.bounds import Fps
from videorepa.settings.sections import ClipSize, Continuation, Generation

_THIRTEEN_BILLION = {"attention_head_dim": 128, "cross_attention_dim": 4096, "num_layers": 48}

_LATER_VAE = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}


class LTXBackbone(Backbone):
    """The live model: its transformer takes latents as a sequence of tokens (B, F H W, C)."""

    @cached_property
    def diffusion(self) -> FlowMatching:
        return FlowMatching(logit_normal=True)

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        embeddings, mask, _, _ = self.stock.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.text_tokens,
            device=self.device,
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def read_scaling(self) -> tuple[Float[Tensor, " c"], Float[Tensor, " c"]]:
        # LTX stores the statistics among the VAE's weights, not in its configuration.
        folder, names = self.spec.folder() / "vae", ("latents_mean", "latents_std")
        statistics: dict[str, Tensor] = {}
        for path in folder.glob("*.safetensors"):
            with safe_open(path, framework="pt") as file:
                statistics |= {
                    name: file.get_tensor(name).float() for name in set(names) & set(file.keys())
                }
        if len(statistics) < len(names):
            raise UserError(
                f"{folder} lacks {' or '.join(names)} among its weights. Copy or download the "
                "folder again."
            )
        mean, spread = (statistics[name] for name in names)
        return mean, self.spec.config("vae")["scaling_factor"] / spread

    def sample_timesteps(
        self, latents: Float[Tensor, "b f c h w"], generator: torch.Generator
    ) -> Num[Tensor, " b"]:
        flow = replace(self.diffusion, shift=math.exp(self.mean(latents)))
        return flow.sample_timesteps(len(latents), generator).to(self.device)

    def mean(self, latents: Float[Tensor, "b f c h w"]) -> float:
        """The mean of the noise levels' logit-normal distribution in training."""
        # As in Lightricks' own trainer it grows with the number of tokens, from 0.95 at 1024 to
        # 2.05 at 4096.
        tokens = latents[0, :, 0].numel()
        return 0.95 + (2.05 - 0.95) * (tokens - 1024) / (4096 - 1024)

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        _, frames, _, height, width = noisy.shape
        ratio, pixels = self.geometry.frames, self.geometry.pixels
        inputs = super().inputs(noisy, text, timestep) | {
            "hidden_states": noisy.to(self.dtype).permute(0, 1, 3, 4, 2).flatten(1, 3)
        }
        if self.spec.positions == "causal":
            return inputs | {
                "video_coords": self._coordinates(noisy),
                "timestep": timestep.float()[:, None],
            }
        return inputs | {
            "num_frames": frames,
            "height": height,
            "width": width,
            "rope_interpolation_scale": (ratio / self.spec.frame_rate, pixels, pixels),
        }

    def _coordinates(self, latents: Float[Tensor, "b f c h w"]) -> Float[Tensor, "b 3 n"]:
        """Seconds, rows and columns at which each token begins, as `LTXConditionPipeline` has them:
        the first latent covers one frame, so the others begin that much earlier."""
        clips, frames, _, height, width = latents.shape
        ratio, pixels = self.geometry.frames, self.geometry.pixels
        times, rows, columns = (
            torch.arange(count, dtype=torch.float32, device=latents.device)
            for count in (frames, height, width)
        )
        times = (ratio * times + 1 - ratio).clamp(min=0) * (1.0 / self.spec.frame_rate)
        grid = torch.meshgrid(times, pixels * rows, pixels * columns, indexing="ij")
        return torch.stack(grid).flatten(1).expand(clips, -1, -1)

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        timestep = inputs["timestep"].reshape(-1, 1)
        return inputs | {"timestep": torch.where(self.shown_tokens(noisy, opening), 0.0, timestep)}

    def continuing(self, frames: Sequence[Any]) -> Config:
        if len(frames) == 1:
            return super().continuing(frames)
        from diffusers.pipelines.ltx.pipeline_ltx_condition import LTXVideoCondition

        # Its argument `video` would take a list of frames for one of videos.
        return {"conditions": LTXVideoCondition(video=list(frames))}

    def velocity(
        self, output: Tensor, noisy: Float[Tensor, "b f c h w"]
    ) -> Float[Tensor, "b f c h w"]:
        _, frames, _, height, width = noisy.shape
        return output.unflatten(1, (frames, height, width)).permute(0, 1, 4, 2, 3)

    def sampling(self, size: ClipSize, settings: Generation) -> dict[str, Any]:
        if self.spec.positions == "causal" and self.scheduler.config["use_dynamic_shifting"]:
            raise UserError(
                f"The scheduler of {self.spec.weights} has use_dynamic_shifting, with which "
                "LTXConditionPipeline fails; so the model is of the first versions. Set "
                "backbone.positions to uniform."
            )
        arguments = super().sampling(size, settings) | {"frame_rate": self.spec.frame_rate}
        if self.spec.config("vae")["timestep_conditioning"]:
            # The decoder does the last denoising step. These are the authors' values.
            arguments |= {"decode_timestep": 0.05, "decode_noise_scale": 0.025}
        return arguments


def check_played_rate(settings: Generation, frame_rate: int, name: str) -> None:
    """Check that clips are played at the rate that the model is told.

    Raises:
      UserError: They are not.
    """
    if settings.fps != frame_rate:
        raise UserError(
            f"generation.fps is {settings.fps} and backbone.frame_rate {frame_rate}: {name} moves "
            "things as fast as its frame rate says, and the file would play them at another. Make "
            "the two equal."
        )


class LTX(BackboneSpec):
    """An LTX-Video pipeline, as a diffusers folder or a Hub id.

    Args:
      frame_rate: Frames per second of the clips, from which the model computes positions in time.
      positions: When a latent begins. "uniform" has latent t at 8 t frames, as LTXPipeline,
        LTXImageToVideoPipeline and the authors' trainer do. "causal" has it at 8 t - 7, where its
        frames are: so does LTXConditionPipeline, which is for 0.9.5 and later.
    """

    live: ClassVar = LTXBackbone
    pipeline_class = "LTXPipeline"
    image_pipeline = "LTXImageToVideoPipeline"
    also_of: ClassVar = ("LTXConditionPipeline",)
    transformer_class = "LTXVideoTransformer3DModel"
    vae_class = "AutoencoderKLLTXVideo"
    text_encoders: ClassVar = {"text_encoder": "T5EncoderModel"}
    text_width = "caption_channels"
    text_mask = True
    generation: ClassVar = {
        "guidance_scale": 3.0,
        "dynamic_guidance": False,
        # The default of the authors' inference.py.
        "negative_prompt": "worst quality, inconsistent motion, blurry, jittery, distorted",
        "fps": 25,
    }
    published: ClassVar = {
        "LTX-Video": {},
        "LTX-Video-0.9.5": {"vae": _LATER_VAE},
        "LTX-Video-0.9.7-dev": {"transformer": _THIRTEEN_BILLION, "vae": _LATER_VAE},
    }
    size: ClassVar = ClipSize(frames=161, height=512, width=704)

    name: Literal["ltx"] = "ltx"
    frame_rate: Fps = 25
    positions: Literal["uniform", "causal"] = "uniform"

    def conditioning(self) -> Conditioning:
        trained = Continuation(latents=(1,), probability=0.1, dropout=0.0)
        # LTXImageToVideoPipeline takes an image alone, LTXConditionPipeline a video too.
        return Conditioning("in place", trained, most=None if self.positions == "causal" else 1)

    @property
    def stock_pipeline(self) -> str:
        return "LTXConditionPipeline" if self.positions == "causal" else super().stock_pipeline

    @property
    def stock_image_pipeline(self) -> str:
        causal = self.positions == "causal"
        return "LTXConditionPipeline" if causal else super().stock_image_pipeline

    @property
    def text_tokens(self) -> int:
        return 128

    @property
    def told_fps(self) -> float:
        return self.frame_rate

    def check_generation(self, settings: Generation) -> None:
        super().check_generation(settings)
        check_played_rate(settings, self.frame_rate, "LTX")

    def compression(self) -> tuple[int, int]:
        vae = self.config("vae")
        halvings = 2 ** sum(vae["spatio_temporal_scaling"])
        return (
            vae["temporal_compression_ratio"] or vae["patch_size_t"] * halvings,
            vae["spatial_compression_ratio"] or vae["patch_size"] * halvings,
        )
