"""HunyuanVideo (arXiv 2412.03603), text or image to video, on unmodified diffusers classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from pydantic import Field
from torch import Tensor, nn

from videorepa.backbones import TWO_STREAMS, Backbone, BackboneSpec, Config, Image, Text, pictures
from videorepa.conditioning import Conditioning, Opening
from videorepa.diffusion import STEPS, FlowMatching
from videorepa.settings.sections import ClipSize, Continuation, Generation

EVERY = {"token_replace": 4, "latent_concat": 2}
"""Of how many of LLaVA's tokens of an image a model reads one, by how it is shown the image."""

ANSWER = 4
"""Tokens that the template has after the caption, which are cut out of what LLaVA says."""

DROPPED = 4
"""First frames that the stock pipeline leaves out of a clip with the image beside its latents."""


class HunyuanVideoBackbone(Backbone):
    """The live model: blocks with separate video and text streams, then single-stream blocks."""

    @cached_property
    def diffusion(self) -> FlowMatching:
        # HunyuanVideo is trained on logit-normal timesteps.
        return FlowMatching(self.scheduler.config["shift"], logit_normal=True)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    def _text_part(self, name: str) -> dict[str, Any]:
        parts = super()._text_part(name)
        if self.spec.text_sees_image and name == "text_encoder":
            parts["image_processor"] = self.image_processor()
        return parts

    def components(self) -> Config:
        unused = {"image_processor": None} if self.spec.text_sees_image else {}
        return unused | super().components()

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        if self.spec.text_sees_image:
            # A black image, as in the stock pipeline's pass for negative prompts.
            return self.encode_text_of(captions, torch.zeros(len(captions), 3, 1, 1))
        embeddings, pooled, mask = self.stock.encode_prompt(
            list(captions), device=self.device, max_sequence_length=self.spec.text_tokens
        )
        return _text(embeddings, pooled, mask)

    @torch.no_grad()
    def encode_text_of(self, captions: Sequence[str], images: Float[Tensor, "b 3 h w"]) -> Text:
        # One by one: of several captions at once, the stock pipeline fails at those that it cuts.
        texts = [
            self.stock.encode_prompt(
                image=picture,
                prompt=caption,
                device=self.device,
                max_sequence_length=self.spec.text_tokens,
                image_embed_interleave=EVERY[self.spec.image_condition],
            )
            for caption, picture in zip(captions, pictures(images), strict=True)
        ]
        return _text(*(torch.cat(tensors) for tensors in zip(*texts, strict=True)))

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        from diffusers.pipelines.hunyuan_video import (
            pipeline_hunyuan_video,
            pipeline_hunyuan_video_image2video,
        )

        # The second encoder always sees 77 tokens at most, for one vector of the whole.
        module = pipeline_hunyuan_video
        if self.spec.text_sees_image:
            module = pipeline_hunyuan_video_image2video
        template = module.DEFAULT_PROMPT_TEMPLATE
        texts = [template["template"].format(caption) for caption in captions]
        return [count - template["crop_start"] for count in super().count_tokens(texts)]

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        inputs = super().inputs(noisy, text, timestep)
        scale = torch.full((len(noisy),), STEPS * self.spec.guidance, device=noisy.device)
        inputs["guidance"] = scale.to(self.dtype) if self.spec.is_told_guidance else None
        if self.spec.image_condition == "latent_concat":
            latents = inputs["hidden_states"]
            # The image's latents, and the mask of those that it covers.
            blank = [torch.zeros_like(latents), torch.zeros_like(latents[:, :1])]
            inputs["hidden_states"] = torch.cat([latents, *blank], dim=1)
        return inputs

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        if self.spec.image_condition == "token_replace":
            return inputs  # The model itself takes the first latent to have no noise.
        channels, latents = noisy.shape[2], inputs["hidden_states"].clone()
        mask = opening.mask(noisy)[:, :1]
        image = torch.where(mask, opening.image["image"], 0.0).permute(0, 2, 1, 3, 4)
        latents[:, channels:-1, :1] = image.to(latents.dtype)
        latents[:, -1:, :1] = mask.transpose(1, 2).to(latents.dtype)
        return inputs | {"hidden_states": latents}

    @torch.no_grad()
    def encode_image(
        self,
        video: Float[Tensor, "b f 3 h w"],
        draws: Sequence[torch.Generator] | None = None,
    ) -> Image:
        return self.encode_first_frame(video)

    def image(
        self,
        stored: Image,
        moments: Float[Tensor, "b m t h w"],
        generator: torch.Generator | None,
    ) -> Image:
        # The posterior's mode, as in the stock pipeline.
        image = self.latents(stored["image"], None)
        is_in_place = self.spec.image_condition == "token_replace"
        return {"latents" if is_in_place else "image": image}

    def sampling(self, size: ClipSize, settings: Generation) -> Config:
        arguments = super().sampling(size, settings)
        if self.spec.image_condition == "latent_concat":
            arguments["num_frames"] += DROPPED
        return arguments


def _text(embeddings: Tensor, pooled: Tensor, mask: Tensor) -> Text:
    return {
        "encoder_hidden_states": embeddings,
        "encoder_attention_mask": mask.bool(),
        "pooled_projections": pooled,
    }


class HunyuanVideo(BackboneSpec):
    """A HunyuanVideo pipeline, as a diffusers folder or a Hub id.

    Args:
      guidance: The guidance scale that the model gets as an input in training, above 0. The
        published model is distilled from guided sampling; 1 trains it on clips as they are.
    """

    live: ClassVar = HunyuanVideoBackbone
    pipeline_class = "HunyuanVideoPipeline"
    image_pipeline = "HunyuanVideoImageToVideoPipeline"
    transformer_class = "HunyuanVideoTransformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo"
    text_encoders: ClassVar = {"text_encoder": "LlamaModel", "text_encoder_2": "CLIPTextModel"}
    text_mask = True
    vocabularies: ClassVar = ("tokenizer", "tokenizer_2")
    lora_targets: ClassVar = TWO_STREAMS
    takes_negative_prompt: ClassVar = False
    generation: ClassVar = {"guidance_scale": 6.0, "dynamic_guidance": False, "fps": 24}
    published: ClassVar = {
        "HunyuanVideo": {},
        "HunyuanVideo-I2V": {"transformer": {"image_condition_type": "token_replace"}},
        "HunyuanVideo-I2V-33ch": {
            "transformer": {
                "image_condition_type": "latent_concat",
                "in_channels": 33,
                "guidance_embeds": False,
            }
        },
    }
    size: ClassVar = ClipSize(frames=129, height=720, width=1280)

    name: Literal["hunyuan_video"] = "hunyuan_video"
    guidance: float = Field(default=1.0, gt=0)

    @property
    def text_tokens(self) -> int:
        return 256

    @property
    def image_condition(self) -> str | None:
        """How the transformer is shown an image, in diffusers' words; None if it is shown none."""
        return self.config("transformer")["image_condition_type"]

    @property
    def text_sees_image(self) -> bool:
        return self.image_condition is not None

    @property
    def is_told_guidance(self) -> bool:
        """Whether the guidance is an input of the transformer."""
        return self.config("transformer")["guidance_embeds"]

    def text_encoder_classes(self) -> dict[str, str]:
        llava = {"text_encoder": "LlavaForConditionalGeneration"} if self.text_sees_image else {}
        return super().text_encoder_classes() | llava

    def text(self) -> Text:
        text, config = super().text(), self.config("transformer")
        if self.image_condition is not None:
            from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video_image2video as i2v

            image = i2v.DEFAULT_PROMPT_TEMPLATE["image_emb_len"] // EVERY[self.image_condition]
            text = {
                name: like.new_empty(image + self.text_tokens - ANSWER, *like.shape[1:])
                for name, like in text.items()
            }
        pooled = torch.empty(config["pooled_projection_dim"], device="meta")
        return text | {"pooled_projections": pooled}

    def conditioning(self) -> Conditioning | None:
        places: dict[str, Literal["in place", "by channels"]] = {
            "token_replace": "in place",
            "latent_concat": "by channels",
        }
        if self.image_condition is None:
            return None
        trained = Continuation(latents=(1,), probability=1.0, dropout=0.0)
        return Conditioning(places[self.image_condition], trained, is_required=True)

    def image(self, size: ClipSize) -> Image:
        if self.image_condition is None:
            return {}
        moments = self.moments(size.model_copy(update={"frames": 1}))
        return {"image": torch.empty(moments, dtype=torch.float16, device="meta")}

    def fingerprint(self) -> dict[str, str]:
        every = {} if self.image_condition is None else {"every": str(EVERY[self.image_condition])}
        return super().fingerprint() | every
