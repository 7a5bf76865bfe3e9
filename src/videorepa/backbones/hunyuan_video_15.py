"""HunyuanVideo 1.5, text or image to video, on unmodified diffusers classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from inspect import signature
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import (
    TWO_STREAMS,
    Backbone,
    BackboneSpec,
    Config,
    Image,
    Part,
    Text,
    pictures,
)
from videorepa.conditioning import Conditioning, Opening
from videorepa.diffusion import FlowMatching
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Continuation, Generation

IMAGE_SIDE, IMAGE_PATCH = 384, 14
"""Pixels along a side of the published SigLIP's image, and of its patches: 729 tokens."""

GLYPH_TOKENS = 256
"""Tokens of a caption's quoted text, which the model is asked to write."""


class HunyuanVideo15Backbone(Backbone):
    """The live model: its transformer always takes an image, which is zero in text mode."""

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
        embeddings = self.spec.image_embeddings()
        # Other than 0 for checkpoints that are distilled to few steps, which are not trained here.
        later = {"timestep_r": None} if self.spec.is_from_image else {}
        return (
            inputs
            | later
            | {
                "hidden_states": torch.cat([latents, no_image], dim=1),
                "image_embeds": latents.new_zeros(len(latents), *embeddings.shape),
                "timestep": timestep.to(self.dtype),
            }
        )

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        if "image_embeds" not in opening.image:
            raise UserError(
                f"{self.spec.weights} sees an image's SigLIP embeddings beside its latents, and "
                "there are none. Encode the images with `encode_image`."
            )
        channels, latents = noisy.shape[2], inputs["hidden_states"].clone()
        mask = opening.mask(noisy)[:, :1]
        image = torch.where(mask, opening.image["image"], 0.0).transpose(1, 2)
        latents[:, channels:-1, :1] = image.to(latents.dtype)
        latents[:, -1:, :1] = mask.transpose(1, 2).to(latents.dtype)
        # The model takes no image for shown if all of a batch's embeddings are zero.
        embeddings = torch.where(mask[:, :, 0, 0], opening.image["image_embeds"], 0.0)
        return inputs | {"hidden_states": latents, "image_embeds": embeddings.to(self.dtype)}

    @torch.no_grad()
    def encode_image(
        self,
        video: Float[Tensor, "b f 3 h w"],
        draws: Sequence[torch.Generator] | None = None,
    ) -> Image:
        if not self.spec.is_from_image:
            return {}
        from diffusers import HunyuanVideo15ImageToVideoPipeline as Stock

        encoder, processor = (self.image_parts[n] for n in ("image_encoder", "feature_extractor"))
        embeddings = [
            Stock._get_image_embeds(encoder, processor, picture, self.device)
            for picture in pictures(video[:, 0])
        ]
        return {"image_embeds": torch.cat(embeddings)}

    def image(
        self,
        stored: Image,
        moments: Float[Tensor, "b m t h w"],
        generator: torch.Generator | None,
    ) -> Image:
        # The posterior's mode, as in the stock pipeline. It is that of the image alone.
        return stored | {"image": self.latents(moments[:, :, :1], None)}

    def sampling(self, size: ClipSize, settings: Generation) -> dict[str, Any]:
        arguments = super().sampling(size, settings)
        # This pipeline fixes the text's length and keeps the guidance scale in a part of its own.
        del arguments["max_sequence_length"], arguments["guidance_scale"]
        if self.spec.is_from_image:
            chosen = self.spec.sampled_size(size)
            if chosen != size:
                sides = f"{chosen.height}x{chosen.width}"
                raise UserError(
                    f"The stock pipeline of {self.spec.weights} chooses a clip's sides by its "
                    f"image's, {sides} for one of {size.height}x{size.width}. Sample at {sides}."
                )
            del arguments["height"], arguments["width"]
        return arguments

    def guide(self, settings: Generation) -> None:
        self.stock.guider = self.stock.guider.new(guidance_scale=settings.guidance_scale)


class HunyuanVideo15(BackboneSpec):
    """A HunyuanVideo 1.5 pipeline, as a diffusers folder or a Hub id."""

    live: ClassVar = HunyuanVideo15Backbone
    pipeline_class = "HunyuanVideo15Pipeline"
    image_pipeline = "HunyuanVideo15ImageToVideoPipeline"
    image_processor: ClassVar = "feature_extractor"
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
        "HunyuanVideo-1.5-Diffusers-480p_i2v": {"model_index": {"_class_name": image_pipeline}},
        "HunyuanVideo-1.5-Diffusers-720p_i2v": {
            "transformer": {"target_size": 960},
            "model_index": {"_class_name": image_pipeline},
        },
    }

    name: Literal["hunyuan_video_15"] = "hunyuan_video_15"

    @property
    def lora_pipeline(self) -> str:
        # The pipeline of 1.5 cannot load LoRA files in diffusers 0.42; HunyuanVideo's, with the
        # same format, can.
        return "HunyuanVideoPipeline"

    @property
    def idle(self) -> tuple[str, ...]:
        # Nothing reads the text that the last block gives.
        last = f"transformer_blocks.{self.geometry().blocks - 1}."
        return f"{last}attn.to_add_out.", f"{last}ff_context."

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

    @property
    def is_from_image(self) -> bool:
        """Whether the folder is that of a model that continues an image."""
        return self.config("model_index").get("_class_name") == self.image_pipeline

    def image_encoders(self) -> dict[str, str]:
        return {"image_encoder": "SiglipVisionModel"} if self.is_from_image else {}

    def image_embeddings(self) -> Tensor:
        """SigLIP's tokens of one image, on the meta device."""
        encoder = self.config("image_encoder") if self.is_from_image else {}
        side = encoder.get("image_size", IMAGE_SIDE) // encoder.get("patch_size", IMAGE_PATCH)
        width = self.config("transformer")["image_embed_dim"]
        return torch.empty(side**2, width, dtype=torch.bfloat16, device="meta")

    def conditioning(self) -> Conditioning | None:
        if not self.is_from_image:
            return None
        # The authors' trainer shows images to 0.3 of the batches.
        trained = Continuation(latents=(1,), probability=1.0, dropout=0.7)
        return Conditioning("by channels", trained, is_required=True, has_blank=True, is_alike=True)

    def image(self, size: ClipSize) -> Image:
        return {"image_embeds": self.image_embeddings()} if self.is_from_image else {}

    def sampled_size(self, size: ClipSize) -> ClipSize:
        # The stock pipeline of images chooses a clip's sides by the image's.
        if not self.is_from_image:
            return size
        from diffusers.pipelines.hunyuan_video1_5.image_processor import (
            HunyuanVideo15ImageProcessor,
        )

        chooses = HunyuanVideo15ImageProcessor(vae_scale_factor=self.geometry().pixels)
        target = self.config("transformer")["target_size"]
        height, width = chooses.calculate_default_height_width(size.height, size.width, target)
        return size.model_copy(update={"height": height, "width": width})
