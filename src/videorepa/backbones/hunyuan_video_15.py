"""HunyuanVideo 1.5, text to video, on unmodified diffusers classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import TWO_STREAMS, Backbone, BackboneSpec, Config, Part, Text
from videorepa.diffusion import FlowMatching
from videorepa.settings.sections import ClipSize, Generation

IMAGE_TOKENS = 729
"""Tokens of the conditioning image; all are zero for text to video."""

GLYPH_TOKENS = 256
"""Tokens of a caption's quoted text, which the model is asked to write."""


class HunyuanVideo15Backbone(Backbone):
    """The live model: its transformer also takes a conditioning image, here none."""

    def __init__(
        self,
        spec: HunyuanVideo15,
        parts: Sequence[Part],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        super().__init__(spec, parts, device, dtype)
        if self.vae is not None:
            # The VAE's attention fails on batches in diffusers 0.42; slicing encodes one by one.
            self.vae.enable_slicing()

    @cached_property
    def diffusion(self) -> FlowMatching:
        # As in the authors' own trainer: logit-normal timesteps and a shift of 3, whatever shift
        # the resolution has in sampling.
        return FlowMatching(shift=3.0, logit_normal=True)

    def components(self) -> Config:
        from diffusers import ClassifierFreeGuidance

        guider = ClassifierFreeGuidance.from_pretrained(self.spec.folder(), subfolder="guider")
        return super().components() | {"guider": guider}

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        from diffusers import HunyuanVideo15Pipeline as Stock

        # The stock pipeline cannot be built without the VAE.
        parts, captions = self.text_parts, list(captions)
        embeddings, mask = Stock._get_mllm_prompt_embeds(
            parts["text_encoder"], parts["tokenizer"], captions, self.device
        )
        glyphs, glyph_mask = Stock._get_byt5_prompt_embeds(
            parts["tokenizer_2"], parts["text_encoder_2"], captions, self.device
        )
        return {
            "encoder_hidden_states": embeddings,
            "encoder_attention_mask": mask.bool(),
            "encoder_hidden_states_2": glyphs,
            "encoder_attention_mask_2": glyph_mask.bool(),
        }

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        from diffusers import HunyuanVideo15Pipeline as Stock
        from diffusers.pipelines.hunyuan_video1_5.pipeline_hunyuan_video1_5 import format_text_input

        options = signature(Stock._get_mllm_prompt_embeds).parameters
        chats = format_text_input(list(captions), options["system_message"].default)
        tokenized = self.text_parts["tokenizer"].apply_chat_template(
            chats, add_generation_prompt=True, tokenize=True, return_dict=True
        )
        return [len(ids) - options["crop_start"].default for ids in tokenized.input_ids]

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        inputs = super().inputs(noisy, text, timestep)
        latents = inputs["hidden_states"]
        # The image's latents, and the mask of the frames that it covers.
        no_image = torch.cat([torch.zeros_like(latents), torch.zeros_like(latents[:, :1])], dim=1)
        width = self.spec.config("transformer")["image_embed_dim"]
        return inputs | {
            "hidden_states": torch.cat([latents, no_image], dim=1),
            "image_embeds": latents.new_zeros(len(latents), IMAGE_TOKENS, width),
            "timestep": timestep.to(self.dtype),
        }

    def sampling(self, size: ClipSize, settings: Generation) -> dict[str, Any]:
        arguments = super().sampling(size, settings)
        # This pipeline fixes the text's length and keeps the guidance scale in a part of its own.
        del arguments["max_sequence_length"], arguments["guidance_scale"]
        return arguments

    def guide(self, settings: Generation) -> None:
        self.stock.guider = self.stock.guider.new(guidance_scale=settings.guidance_scale)


class HunyuanVideo15(BackboneSpec):
    """A HunyuanVideo 1.5 pipeline, as a diffusers folder or a Hub id."""

    live: ClassVar = HunyuanVideo15Backbone
    pipeline_class = "HunyuanVideo15Pipeline"
    transformer_class = "HunyuanVideo15Transformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo15"
    # The second encodes a caption's quoted text letter by letter, for the model to write it.
    text_encoders: ClassVar = {
        "text_encoder": "Qwen2_5_VLTextModel",
        "text_encoder_2": "T5EncoderModel",
    }
    text_mask = True
    prompt_arguments: ClassVar = {
        "encoder_hidden_states": "prompt_embeds",
        "encoder_attention_mask": "prompt_embeds_mask",
        "encoder_hidden_states_2": "prompt_embeds_2",
        "encoder_attention_mask_2": "prompt_embeds_mask_2",
    }
    lora_targets: ClassVar = TWO_STREAMS
    generation: ClassVar = {"guidance_scale": 6.0, "dynamic_guidance": False, "fps": 24}
    published: ClassVar = {
        "HunyuanVideo-1.5-Diffusers-480p_t2v": {},
        "HunyuanVideo-1.5-Diffusers-720p_t2v": {"transformer": {"target_size": 960}},
    }

    name: Literal["hunyuan_video_15"] = "hunyuan_video_15"

    @property
    def lora_pipeline(self) -> str:
        # The pipeline of 1.5 cannot load LoRA files in diffusers 0.42; HunyuanVideo's, with the
        # same format, can.
        return "HunyuanVideoPipeline"

    @property
    def text_tokens(self) -> int:
        return 1000

    def default_size(self) -> ClipSize:
        if self.config("transformer")["target_size"] > 640:
            return ClipSize(frames=121, height=720, width=1280)
        return ClipSize(frames=121, height=480, width=848)

    def text(self) -> Text:
        width = self.config("transformer")["text_embed_2_dim"]
        with torch.device("meta"):
            return super().text() | {
                "encoder_hidden_states_2": torch.empty(GLYPH_TOKENS, width),
                "encoder_attention_mask_2": torch.empty(GLYPH_TOKENS, dtype=torch.bool),
            }
