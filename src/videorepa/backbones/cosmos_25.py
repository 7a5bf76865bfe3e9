"""Cosmos-Predict2.5 (arXiv 2511.00062), from text, an image or a video, on unmodified classes.

The transformer projects a caption's 512 x 100,352 numbers to 512 x 1,024 first of all. Captions are
stored projected, so the projection stays as published, also where all other weights are trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.nn import functional as F

from videorepa.backbones import Config, Part, Text
from videorepa.backbones._cosmos import TWO_BILLION, CosmosBackbone, CosmosSpec
from videorepa.conditioning import Conditioning, latents_for
from videorepa.diffusion import FlowMatching
from videorepa.errors import UserError
from videorepa.settings.sections import Continuation
from videorepa.system.fingerprint import json_digest

_PROJECTION = {"use_crossattn_projection": True, "crossattn_proj_in_channels": 100352}


SYSTEM_PROMPT = "You are a helpful assistant who will provide prompts to an image generator."
"""What the stock pipeline tells the text encoder before each caption."""


class Projection(nn.Sequential):
    """The stock projection of text, by which text passes that has been projected before."""

    def __init__(self, stock: nn.Sequential) -> None:
        super().__init__(*stock)
        self.width = stock[0].out_features

    def forward(self, text: Tensor) -> Tensor:
        return text if text.shape[-1] == self.width else super().forward(text)


class Cosmos25Backbone(CosmosBackbone):
    """The live model of Predict2.5."""

    def __init__(
        self, spec: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, parts, device, dtype)
        if self.transformer is not None:
            self.transformer.crossattn_proj = Projection(self.transformer.crossattn_proj)

    def reinitialise(self, seed: int) -> None:
        super().reinitialise(seed)
        # Captions were stored as the published projection has them.
        projection = Projection(self.transformer.crossattn_proj)
        for fresh, published in zip(projection.parameters(), self.spec.projection(), strict=True):
            fresh.data.copy_(published)
        self.transformer.crossattn_proj = projection

    @cached_property
    def diffusion(self) -> FlowMatching:
        return FlowMatching(shift=5.0, logit_normal=True)

    def components(self) -> Config:
        modules = super().components()
        if self.vae is None:
            # The stock pipeline reads its configuration.
            modules["vae"] = self.spec.vae_skeleton(self.vae_dtype)
        return modules

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        states = super().encode_text(captions)["encoder_hidden_states"].to(self.dtype)
        weight, bias = (value.to(states) for value in self.spec.projection())
        return {"encoder_hidden_states": F.gelu(F.linear(states, weight, bias))}

    def continuing(self, frames: Sequence[Any]) -> Config:
        count = latents_for(len(frames), self.geometry.frames)
        # One image alone would need torchvision; a clip of one frame gives the same.
        return {"video": list(frames), "num_latent_conditional_frames": count}

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        chats = [
            [
                {"role": role, "content": [{"type": "text", "text": text}]}
                for role, text in (("system", SYSTEM_PROMPT), ("user", caption))
            ]
            for caption in captions
        ]
        tokenized = self.text_parts["tokenizer"].apply_chat_template(
            chats, tokenize=True, return_dict=True
        )
        return [len(ids) for ids in tokenized.input_ids]


class Cosmos25(CosmosSpec):
    """A Cosmos-Predict2.5 pipeline, as a diffusers folder or a Hub id."""

    live: ClassVar = Cosmos25Backbone
    pipeline_class = "Cosmos2_5_PredictBasePipeline"
    image_pipeline = pipeline_class
    text_encoders: ClassVar = {"text_encoder": "Qwen2_5_VLForConditionalGeneration"}
    text_width = "encoder_hidden_states_channels"
    published: ClassVar = {
        "Cosmos-Predict2.5-2B": {"transformer": TWO_BILLION | _PROJECTION},
        "Cosmos-Predict2.5-14B": {
            "transformer": TWO_BILLION | _PROJECTION | {"num_attention_heads": 40, "num_layers": 36}
        },
    }
    time_shown: ClassVar = 1e-4
    is_in_comfyui: ClassVar = False  # It has no projection of text.

    name: Literal["cosmos_25"] = "cosmos_25"

    def conditioning(self) -> Conditioning:
        trained = Continuation(latents=(1, 2), probability=0.5, dropout=0.0)
        return Conditioning("in place", trained, most=2)

    @property
    def idle(self) -> tuple[str, ...]:
        return ("crossattn_proj.",)  # It has projected the text before it is stored.

    def raw_text(self) -> Text:
        width = self.config("transformer")["crossattn_proj_in_channels"]
        states = torch.empty(self.text_tokens, width, device="meta")
        return {"encoder_hidden_states": states}

    def projection(self) -> tuple[Tensor, Tensor]:
        """The weight and the bias of the published projection of text.

        Raises:
          UserError: The transformer's files lack them.
        """
        folder = self.folder() / self.part  # It is downloaded if it is not here.
        names = [f"crossattn_proj.0.{kind}" for kind in ("weight", "bias")]
        values: dict[str, Tensor] = {}
        for path in self.weight_files():
            with safe_open(path, framework="pt") as file:
                values |= {name: file.get_tensor(name) for name in {*names} & {*file.keys()}}
        if len(values) < len(names):
            raise UserError(
                f"{folder} lacks {' or '.join(names)} among its weights. Copy "
                "or download the folder again."
            )
        return values[names[0]], values[names[1]]

    def fingerprint(self) -> dict[str, str]:
        # The bias alone tells projections apart.
        _, bias = self.projection()
        return super().fingerprint() | {"text_projection": json_digest(bias.float().tolist())}
