"""LTX-2 and 2.3 (arXiv 2601.03233), video alone, on unmodified diffusers classes.

The model denoises video and sound together. Here its two halves are isolated from each other, by a
switch of the stock transformer, so that the video does not depend on sound; what the transformer is
given of sound is one token of zeros. Sound's weights get no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from videorepa.backbones import Backbone, BackboneSpec, Config, Part, Text
from videorepa.backbones.ltx import LTX, LTXBackbone, check_played_rate
from videorepa.conditioning import Conditioning, Opening
from videorepa.diffusion import STEPS
from videorepa.settings.bounds import Fps
from videorepa.settings.sections import ClipSize, Continuation, Generation
from videorepa.system.fingerprint import weights_digest

_RATIOS = {"spatial_compression_ratio": 32, "temporal_compression_ratio": 8}

UNIFORM = 0.1
"""Share of samples in training whose noise level is uniform."""

LOWEST = 1e-3
"""The lowest noise level in training, but for those that are mirrored there."""

PERCENTILES = (-2.5758, 3.0902)
"""The 0.5th and 99.9th percentile of the normal distribution. Training stretches noise levels so
that those at them become 0 and 1."""


class Connectors:
    """The stock connectors of text, by which text passes that has been through them before.

    Args:
      stock: `LTX2TextConnectors`, or None where no text is encoded.
      widths: Channels of a token for the video and for sound.
    """

    def __init__(self, stock: nn.Module | None, widths: tuple[int, int]) -> None:
        self.stock, self.widths = stock, widths

    def __call__(
        self, states: Tensor, mask: Tensor, padding_side: str = "left"
    ) -> tuple[Tensor, Tensor, Tensor]:
        if states.shape[-1] == sum(self.widths):
            video, sound = states.split(self.widths, dim=-1)
            return video, sound, mask
        assert self.stock is not None
        return self.stock(states, mask, padding_side=padding_side)


class LTX2Backbone(LTXBackbone):
    """The live model: tokens of the video as of LTX, and sound beside it."""

    def __init__(
        self, spec: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, parts, device, dtype)
        stock = None
        if "text_encoder" in parts:
            with self.loading():
                stock = self.whole("LTX2TextConnectors", "connectors", dtype)
        self.connectors = Connectors(stock, spec.text_widths)

    def whole(self, stock_class: str, part: str, dtype: torch.dtype) -> Any:
        import diffusers
        from diffusers.pipelines import ltx2

        if hasattr(diffusers, stock_class) or not hasattr(ltx2, stock_class):
            return super().whole(stock_class, part, dtype)
        loader = getattr(ltx2, stock_class)
        source = self.spec.folder()
        model = loader.from_pretrained(source, subfolder=part, torch_dtype=dtype)
        return model.to(self.home).eval().requires_grad_(False)

    def components(self) -> Config:
        sound: Config = {"audio_vae": None, "vocoder": None}
        if self.vae is not None and self.transformer is not None:
            sound = self._sound
        return super().components() | sound | {"connectors": self.connectors}

    @cached_property
    def _sound(self) -> Config:
        """What turns the sound that is sampled into a waveform."""
        index = self.spec.config("model_index")
        with self.loading():
            return {
                part: self.whole(index[part][1], part, self.dtype)
                for part in ("audio_vae", "vocoder")
            }

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        states, mask, _, _ = self.stock.encode_prompt(
            list(captions),
            do_classifier_free_guidance=False,
            max_sequence_length=self.spec.text_tokens,
            device=self.device,
        )
        video, sound, mask = self.connectors(states, mask)
        return {
            "encoder_hidden_states": torch.cat([video, sound], dim=-1),
            "encoder_attention_mask": mask.bool(),
        }

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        return super().count_tokens([caption.strip() for caption in captions])

    def sample_timesteps(
        self, latents: Float[Tensor, "b f c h w"], generator: torch.Generator
    ) -> Num[Tensor, " b"]:
        usual = super().sample_timesteps(latents, generator) / STEPS
        low, high = (1 / (1 + math.exp(-self.mean(latents) - x)) for x in PERCENTILES)
        stretched = (usual - low) / (high - low)
        stretched = torch.where(stretched < LOWEST, 2 * LOWEST - stretched, stretched).clamp(0, 1)
        which, place = torch.rand(2, len(latents), generator=generator).to(self.device)
        uniform = LOWEST + (1 - LOWEST) * place
        return STEPS * torch.where(which < UNIFORM, uniform, stretched)

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        count, frames, _, height, width = noisy.shape
        inputs = Backbone.inputs(self, noisy, text, timestep)
        video, sound = inputs["encoder_hidden_states"].split(self.spec.text_widths, dim=-1)
        channels = self.spec.config("transformer")["audio_in_channels"]
        fps = float(self.spec.frame_rate)
        places = self.transformer.rope.prepare_video_coords(
            count, frames, height, width, noisy.device, fps=fps
        )
        return inputs | {
            "hidden_states": noisy.to(self.dtype).permute(0, 1, 3, 4, 2).flatten(1, 3),
            "audio_hidden_states": video.new_zeros(count, 1, channels),
            "encoder_hidden_states": video,
            "audio_encoder_hidden_states": sound,
            "audio_encoder_attention_mask": inputs["encoder_attention_mask"],
            "sigma": timestep,
            "num_frames": frames,
            "height": height,
            "width": width,
            "fps": fps,
            "video_coords": places,
            "audio_num_frames": 1,
            "isolate_modalities": True,
            "use_cross_timestep": True,
        }

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        shown, timestep = self.shown_tokens(noisy, opening), inputs["timestep"]
        return inputs | {
            "timestep": torch.where(shown, 0.0, timestep[:, None]),
            "audio_timestep": timestep,
        }

    def sampling(self, size: ClipSize, settings: Generation) -> dict[str, Any]:
        arguments = Backbone.sampling(self, size, settings)
        return arguments | {"frame_rate": float(self.spec.frame_rate)}

    def unguided(self) -> Config:
        return {
            "audio_guidance_scale": 1.0,
            "stg_scale": 0.0,
            "audio_stg_scale": 0.0,
            # The isolated pass, which is made for sound's sake, takes the other's place.
            "modality_scale": 0.0,
            "guidance_rescale": 0.0,
        }


class LTX2(BackboneSpec):
    """An LTX-2 or 2.3 pipeline, as a diffusers folder or a Hub id.

    Args:
      frame_rate: Frames per second of the clips, from which the model computes positions in time.
    """

    live: ClassVar = LTX2Backbone
    pipeline_class = "LTX2Pipeline"
    image_pipeline = "LTX2ImageToVideoPipeline"
    transformer_class = "LTX2VideoTransformer3DModel"
    vae_class = "AutoencoderKLLTX2Video"
    text_encoders: ClassVar = {"text_encoder": "Gemma3ForConditionalGeneration"}
    lora_targets: ClassVar = tuple(
        f"{attention}.{layer}"
        for attention in ("attn1", "attn2")
        for layer in BackboneSpec.lora_targets
    )
    generation: ClassVar = {
        "steps": 30,
        "guidance_scale": 3.0,
        "dynamic_guidance": False,
        "fps": 24,
    }
    published: ClassVar = {
        "LTX-2": {"transformer": {"rope_type": "split"}, "vae": _RATIOS},
        "LTX-2.3-Diffusers": {
            "transformer": {
                "rope_type": "split",
                "gated_attn": True,
                "cross_attn_mod": True,
                "audio_gated_attn": True,
                "audio_cross_attn_mod": True,
                "perturbed_attn": True,
                "use_prompt_embeddings": False,
            },
            "vae": _RATIOS,
        },
    }
    size: ClassVar = ClipSize(frames=121, height=512, width=768)

    name: Literal["ltx2"] = "ltx2"
    frame_rate: Fps = 24

    @property
    def idle(self) -> tuple[str, ...]:
        # Sound is not trained, and the video does not see it.
        return "audio", "av_cross_attn", "a2v_cross_attn"

    @property
    def text_tokens(self) -> int:
        return 1024

    @property
    def text_widths(self) -> tuple[int, int]:
        """Channels of a text token for the video and for sound."""
        config = self.config("transformer")
        if config["use_prompt_embeddings"]:
            return config["caption_channels"], config["caption_channels"]
        return config["cross_attention_dim"], config["audio_cross_attention_dim"]

    def text(self) -> Text:
        with torch.device("meta"):
            return {
                "encoder_hidden_states": torch.empty(self.text_tokens, sum(self.text_widths)),
                "encoder_attention_mask": torch.empty(self.text_tokens, dtype=torch.bool),
            }

    @property
    def told_fps(self) -> float:
        return self.frame_rate

    def check_generation(self, settings: Generation) -> None:
        super().check_generation(settings)
        check_played_rate(settings, self.frame_rate, "LTX-2")

    compression = LTX.compression

    def conditioning(self) -> Conditioning:
        trained = Continuation(latents=(1,), probability=0.5, dropout=0.0)
        return Conditioning("in place", trained)

    def fingerprint(self) -> dict[str, str]:
        connectors = weights_digest(self.folder() / "connectors")
        return super().fingerprint() | {"connectors": connectors}
