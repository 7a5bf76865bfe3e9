"""Kandinsky 5.0 Lite, text or image to video, on unmodified diffusers classes."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn
from torch.nn.functional import pad

from videorepa.backbones import Backbone, BackboneSpec, Config, Geometry, Image, Part, Text
from videorepa.conditioning import Conditioning, Opening
from videorepa.diffusion import FlowMatching
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Continuation, Generation

NORMALISED = 4
"""First latents that the stock image pipeline brings to the statistics of the later ones."""

_LITE = {
    "in_visual_dim": 16,
    "out_visual_dim": 16,
    "model_dim": 1792,
    "ff_dim": 7168,
    "visual_cond": True,
}


class Kandinsky5Backbone(Backbone):
    """The live model: its transformer takes latents (B, F, H, W, C), and text without a mask."""

    def __init__(
        self, spec: Any, parts: Sequence[Part], device: torch.device, dtype: torch.dtype
    ) -> None:
        super().__init__(spec, parts, device, dtype)
        if (vae := self.vae) is not None:
            # The image pipeline gives it an image in the transformer's dtype, which in training is
            # another.
            vae.encoder.register_forward_pre_hook(
                lambda _, given: tuple(pixels.to(vae.dtype) for pixels in given)
            )

    @cached_property
    def diffusion(self) -> FlowMatching:
        # The authors have not published how they train; this is as of HunyuanVideo.
        return FlowMatching(self.scheduler.config["shift"], logit_normal=True)

    def blocks(self) -> Sequence[nn.Module]:
        return self.transformer.visual_transformer_blocks

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Text:
        # One by one: in a batch, the stock pipeline lets the model read the padding.
        texts = [
            self.stock.encode_prompt(
                caption, max_sequence_length=self.spec.text_tokens, device=self.device
            )
            for caption in captions
        ]
        lengths = torch.tensor([embeddings.shape[1] for embeddings, *_ in texts])
        padded = [pad(e, (0, 0, 0, self.spec.text_tokens - e.shape[1])) for e, *_ in texts]
        mask = torch.arange(self.spec.text_tokens) < lengths[:, None]
        return {
            "encoder_hidden_states": torch.cat(padded),
            "encoder_attention_mask": mask.to(self.device),
            "pooled_projections": torch.cat([pooled for _, pooled, _ in texts]),
        }

    def count_tokens(self, captions: Sequence[str]) -> list[int]:
        # CLIP always sees 77 tokens at most, for one vector of the whole.
        counts = super().count_tokens([self.stock.prompt_template.format(c) for c in captions])
        return [count - self.stock.prompt_template_encode_start_idx for count in counts]

    def prompt(self, text: Text) -> Text:
        embeddings, length = self._seen(text)
        return {
            "prompt_embeds_qwen": embeddings,
            "prompt_embeds_clip": text["pooled_projections"],
            "prompt_cu_seqlens": length * torch.arange(len(embeddings) + 1, dtype=torch.int32),
        }

    def _seen(self, text: Text) -> tuple[Float[Tensor, "b n d"], int]:
        """The embeddings without their padding, and how many each caption has."""
        embeddings, mask = text["encoder_hidden_states"], text["encoder_attention_mask"]
        lengths = {embeddings.shape[1]} if mask.is_meta else {*mask.sum(1).tolist()}
        if len(lengths) > 1:
            raise UserError(
                f"The captions of a batch have {', '.join(map(str, sorted(lengths)))} tokens; "
                f"{self.spec.weights} reads all of a batch's as far as the longest. Take one clip "
                "at a time."
            )
        (length,) = lengths
        return embeddings[:, :length], length

    def inputs(
        self, noisy: Float[Tensor, "b f c h w"], text: Text, timestep: Num[Tensor, " b"]
    ) -> Config:
        _, frames, _, height, width = noisy.shape
        patch, pixels = self.geometry.patch, self.geometry.pixels
        embeddings, length = self._seen(text)
        latents = noisy.to(self.dtype).permute(0, 1, 3, 4, 2)
        if self.spec.config("transformer")["visual_cond"]:
            # A place for the image that the authors leave empty, and the mask of what is shown.
            blank = [torch.zeros_like(latents), torch.zeros_like(latents[..., :1])]
            latents = torch.cat([latents, *blank], dim=-1)
        sizes = frames, height // patch, width // patch
        return {
            "hidden_states": latents,
            "encoder_hidden_states": embeddings.to(self.dtype),
            "pooled_projections": text["pooled_projections"].to(self.dtype),
            "timestep": timestep.to(self.dtype),
            "visual_rope_pos": [torch.arange(size, device=noisy.device) for size in sizes],
            "text_rope_pos": torch.arange(length, device=noisy.device),
            "scale_factor": self.stock._get_scale_factor(height * pixels, width * pixels),
            "sparse_params": None,
        }

    def shown(self, inputs: Config, noisy: Float[Tensor, "b f c h w"], opening: Opening) -> Config:
        latents = inputs["hidden_states"].clone()
        latents[..., -1:] = opening.mask(noisy).to(latents.dtype)
        return inputs | {"hidden_states": latents}

    def predict(self, inputs: Config) -> Tensor:
        return self.transformer(**inputs, return_dict=False)

    def velocity(
        self, output: Tensor, noisy: Float[Tensor, "b f c h w"]
    ) -> Float[Tensor, "b f c h w"]:
        return output.permute(0, 1, 4, 2, 3)

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
        return {"latents": self.latents(stored["image"], generator)}

    def sampling(self, size: ClipSize, settings: Generation) -> Config:
        least = self.spec.sampled_size(size).frames
        if size.frames < least:
            raise UserError(
                f"The stock pipeline of {self.spec.weights} gives nothing but NaN for "
                f"{size.frames} frames: it compares a clip's first {NORMALISED} latents with "
                f"those after them. Sample {least} frames or more."
            )
        # Without one, the pipeline would take its own.
        return super().sampling(size, settings) | {"negative_prompt": settings.negative_prompt}


class Kandinsky5(BackboneSpec):
    """A Kandinsky 5.0 pipeline, as a diffusers folder or a Hub id."""

    live: ClassVar = Kandinsky5Backbone
    pipeline_class = "Kandinsky5T2VPipeline"
    image_pipeline = "Kandinsky5I2VPipeline"
    transformer_class = "Kandinsky5Transformer3DModel"
    vae_class = "AutoencoderKLHunyuanVideo"
    text_encoders: ClassVar = {
        "text_encoder": "Qwen2_5_VLForConditionalGeneration",
        "text_encoder_2": "CLIPTextModel",
    }
    has_channels_last = True
    text_width = "in_text_dim"
    text_mask = True
    vocabularies: ClassVar = ("tokenizer", "tokenizer_2")
    lora_targets: ClassVar = (
        *("to_query", "to_key", "to_value"),
        *("self_attention.out_layer", "cross_attention.out_layer"),
    )
    generation: ClassVar = {
        "guidance_scale": 5.0,
        "dynamic_guidance": False,
        "fps": 24,
        "negative_prompt": (
            "Static, 2D cartoon, cartoon, 2d animation, paintings, images, worst quality, low "
            "quality, ugly, deformed, walking backwards"
        ),
    }
    published: ClassVar = {
        "Kandinsky-5.0-T2V-Lite-pretrain-5s-Diffusers": {"transformer": _LITE},
        "Kandinsky-5.0-T2V-Lite-sft-5s-Diffusers": {"transformer": _LITE},
        "Kandinsky-5.0-T2V-Lite-nocfg-5s-Diffusers": {"transformer": _LITE},
        "Kandinsky-5.0-I2V-Lite-5s": {
            "transformer": _LITE,
            "model_index": {"_class_name": image_pipeline},
        },
    }
    size: ClassVar = ClipSize(frames=121, height=512, width=768)

    name: Literal["kandinsky5"] = "kandinsky5"

    @property
    def text_tokens(self) -> int:
        return 256

    def geometry(self) -> Geometry:
        transformer = self.config("transformer")
        frames, pixels = self.compression()
        return Geometry(
            frames=frames,
            pixels=pixels,
            patch=transformer["patch_size"][-1],
            channels=transformer["out_visual_dim"],
            width=transformer["model_dim"],
            blocks=transformer["num_visual_blocks"],
        )

    def text(self) -> Text:
        pooled = torch.empty(self.config("transformer")["in_text_dim2"], device="meta")
        return super().text() | {"pooled_projections": pooled}

    @property
    def is_from_image(self) -> bool:
        """Whether the folder is that of a model that continues an image."""
        return self.config("model_index").get("_class_name") == self.image_pipeline

    def conditioning(self) -> Conditioning | None:
        if not self.is_from_image:
            return None
        trained = Continuation(latents=(1,), probability=1.0, dropout=0.0)
        return Conditioning("in place", trained, is_required=True)

    def image(self, size: ClipSize) -> Image:
        if not self.is_from_image:
            return {}
        moments = self.moments(size.model_copy(update={"frames": 1}))
        return {"image": torch.empty(moments, dtype=torch.float16, device="meta")}

    def sampled_size(self, size: ClipSize) -> ClipSize:
        if not self.is_from_image:
            return size
        least = 1 + NORMALISED * self.geometry().frames
        return size.model_copy(update={"frames": max(size.frames, least)})

    def check_clip(self, size: ClipSize) -> None:
        super().check_clip(size)
        if self.config("transformer")["attention_type"] != "regular":
            raise UserError(
                f"{self.weights} has the attention of the 10 second models (nabla), which orders "
                "tokens in tiles and runs on GPUs alone. Take a model of 5 seconds."
            )

    def check_batch(self, clips: int) -> None:
        if clips > 1:
            raise UserError(
                f"{self.weights} reads its text without a mask, so a batch's captions would have "
                f"to be of one length. Set optim.batch_size to 1, and multiply optim.accumulate by "
                f"{clips}."
            )
