"""HunyuanVideo (arXiv 2412.03603), text to video, on unmodified diffusers classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import ClassVar, Literal

import torch
from jaxtyping import Float, Num
from pydantic import Field
from torch import Tensor, nn

from videorepa.backbones import TWO_STREAMS, Backbone, BackboneSpec, Config, Text
from videorepa.diffusion import STEPS, FlowMatching
from videorepa.settings.sections import ClipSize


class HunyuanVideoBackbone(Backbone):
    """The live model: blocks with separate video and text streams, then single-stream blocks."""

    @cached_property
    def diffusion(self) -> FlowMatching:
        # HunyuanVideo is trained on logit-normal timesteps.
        return FlowMatching(self.scheduler.config["shift"], logit_normal=True)

    def blocks(self) -> Sequence[nn.Module]:
        return [*self.transformer.transformer_blocks, *self.transformer.single_transformer_blocks]

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        embeddings, pooled, mask = self.stock.encode_prompt(
            list(captions), device=self.device, max_sequence_length=self.spec.text_tokens
        )
        return {
            "encoder_hidden_states": embeddings,
            "encoder_attention_mask": mask.bool(),
            "pooled_projections": pooled,
        }

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE

        # The second encoder always sees 77 tokens at most, for one vector of the whole.
        template, cropped = (
            DEFAULT_PROMPT_TEMPLATE["template"],
            DEFAULT_PROMPT_TEMPLATE["crop_start"],
        )
        counts = super().count_tokens([template.format(caption) for caption in captions])
        return [count - cropped for count in counts]

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        scale = torch.full((len(noisy),), STEPS * self.spec.guidance, device=noisy.device)
        return super().inputs(noisy, text, timestep) | {"guidance": scale.to(self.dtype)}


class HunyuanVideo(BackboneSpec):
    """A HunyuanVideo pipeline, as a diffusers folder or a Hub id.

    Args:
      guidance: The guidance scale that the model gets as an input in training, above 0. The
        published model is distilled from guided sampling; 1 trains it on clips as they are.
    """

    live: ClassVar = HunyuanVideoBackbone
    pipeline_class = "HunyuanVideoPipeline"
    transformer_class = "HunyuanVideoTransformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo"
    text_encoders: ClassVar = {"text_encoder": "LlamaModel", "text_encoder_2": "CLIPTextModel"}
    text_mask = True
    vocabularies: ClassVar = ("tokenizer", "tokenizer_2")
    lora_targets: ClassVar = TWO_STREAMS
    takes_negative_prompt: ClassVar = False
    generation: ClassVar = {"guidance_scale": 6.0, "dynamic_guidance": False, "fps": 24}
    published: ClassVar = {"HunyuanVideo": {}}
    size: ClassVar = ClipSize(frames=129, height=720, width=1280)

    name: Literal["hunyuan_video"] = "hunyuan_video"
    guidance: float = Field(default=1.0, gt=0)

    @property
    def text_tokens(self) -> int:
        return 256

    def text(self) -> Text:
        width = self.config("transformer")["pooled_projection_dim"]
        return super().text() | {"pooled_projections": torch.empty(width, device="meta")}
