"""mPLUG-Owl-Video, the model that judges clips for VideoPhy, on stock layers of transformers.

It consists of a CLIP vision tower whose layers first mix along time, an abstractor that condenses a
clip into a few tokens, and LLaMA. Mixing along time and the abstractor, which transformers lacks,
are written here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from videorepa.errors import UserError
from videorepa.system.weights import Misfit

VIDEO = -2
"""The id in a prompt for every token of the video."""

# The published sizes, for whatever a configuration leaves out.
_PUBLISHED = {
    "vision_config": {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "patch_size": 14,
        "image_size": 224,
        "layer_norm_eps": 1e-6,
        "hidden_act": "quick_gelu",
    },
    "visual_abstractor_config": {
        "intermediate_size": 4096,
        "num_hidden_layers": 6,
        "num_attention_heads": 16,
        "layer_norm_eps": 1e-6,
    },
    "text_config": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
    },
}

_CROSS = r"abstractor.encoder.layers.\1.crossattention."

# Patterns of the names here, and the published names.
_NAMES = {
    r"vision_model\.(cls_token|position_embedding|patch_embed|pre_layernorm)": (
        r"vision_model.embeddings.\1"
    ),
    r"vision_model\.along_time\.(\d+)": r"vision_model.encoder.layers.\1.temporal",
    r"vision_model\.in_frame\.(\d+)": r"vision_model.encoder.layers.\1",
    r"(vision_model\..*)\.layer_norm1": r"\1.input_layernorm",
    r"(vision_model\..*)\.layer_norm2": r"\1.post_attention_layernorm",
    r"(vision_model\..*)\.out_proj": r"\1.dense",
    r"abstractor\.layers\.(\d+)\.(norm1|normk)": _CROSS + r"\2",
    r"abstractor\.layers\.(\d+)\.(query|key|value)": _CROSS + r"attention.\2",
    r"abstractor\.layers\.(\d+)\.(out_proj|norm2)": _CROSS + r"output.\2",
    r"abstractor\.layers\.(\d+)\.(w1|w2|w3|ffn_ln)": _CROSS + r"output.mlp.\2",
}

_JOINT = re.compile(r"(vision_model\..*)\.([qkv])_proj\.(weight|bias)")

# Old versions of transformers stored these, which the configuration determines.
_IGNORED = re.compile(r"language_model\..*\.rotary_emb\.inv_freq")


class MPlugOwlVideo(nn.Module):
    """The model without weights, on the meta device. `from_state_dict` makes one with weights.

    In shapes, a clip has m tokens, 65 as published, of the language model's width d. The vision
    tower has n tokens per frame, of width w, with the class token first.

    Args:
        config: The published config.json.

    Attributes:
        side: Side of a frame in pixels.
        video_tokens: Tokens of a clip, m.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        sections = {
            name: {key: (config.get(name) or {}).get(key, value) for key, value in sizes.items()}
            for name, sizes in _PUBLISHED.items()
        }
        vision: Any = CLIPVisionConfig(**sections["vision_config"])
        vision._attn_implementation = "sdpa"
        text = LlamaConfig(**sections["text_config"])
        width = vision.hidden_size
        queries = (1, config.get("num_query_tokens", 64), width)
        with torch.device("meta"):
            self.query_tokens = nn.Parameter(torch.empty(queries))
            self.temporal_query_tokens = nn.Parameter(torch.empty(queries))
            self.vision_model = VisionTower(vision)
            self.abstractor = Abstractor(
                width, text.hidden_size, **sections["visual_abstractor_config"]
            )
            self.language_model = LlamaForCausalLM(text)
        self.side: int = vision.image_size
        self.video_tokens: int = queries[1] + 1
        # Its buffers are computed, not loaded, so they must not stay on the meta device.
        self.language_model.model.rotary_emb = LlamaRotaryEmbedding(text)
        self.eval().requires_grad_(False)

    @classmethod
    def from_state_dict(
        cls,
        config: Mapping[str, Any],
        state_dict: Mapping[str, Tensor],
        dtype: torch.dtype | None = None,
    ) -> MPlugOwlVideo:
        """The model with exactly these weights.

        Args:
            config: The published config.json.
            state_dict: Weights under their published names. Those that have the dtype already are
                shared, not copied.
            dtype: bfloat16 or float32. By default the weights' own.

        Raises:
            UserError: Weights are missing, superfluous or of another shape; or the dtype is
                neither. The class token doubles in every layer, which float16 cannot hold.
        """
        model = cls(config)
        weights = {key: value for key, value in state_dict.items() if not _IGNORED.fullmatch(key)}
        if misfit := Misfit.between(weights, model.published_shapes()):
            raise UserError(
                f"The weights do not fit mPLUG-Owl-Video as its configuration has it; {misfit}. "
                "Compare the folder with the one it was copied from; a LoRA has to be merged first."
            )
        dtype = dtype or weights["query_tokens"].dtype
        if dtype not in (torch.bfloat16, torch.float32):
            raise UserError(
                f"The judge cannot compute in {dtype}: its class token doubles in each of the "
                "vision tower's layers, which overflows. Load it in bfloat16 or float32."
            )
        own = {}
        for name, expected in model.state_dict().items():
            value = weights[_published_name(name)]
            if joint := _JOINT.fullmatch(name):
                # Rows are ordered by head first, and only then by query, key and value.
                heads = model.vision_model.heads
                by_head = value.unflatten(0, (heads, 3, -1))
                value = by_head[:, "qkv".index(joint[2])].flatten(0, 1)
            own[name] = value.reshape(expected.shape).to(dtype)
        model.load_state_dict(own, assign=True)
        return model.requires_grad_(False)

    def published_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight, under its published name."""
        shapes: dict[str, tuple[int, ...]] = {}
        for name, value in self.state_dict().items():
            shape = tuple(value.shape)
            if _JOINT.fullmatch(name):
                shape = (3 * shape[0], *shape[1:])
            elif ".along_time." in name and len(shape) > 1:
                shape += (1,) * (5 - len(shape))  # Stored as a kernel of three dimensions.
            shapes[_published_name(name)] = shape
        return shapes

    def forward(
        self, video_pixel_values: Float[Tensor, "b 3 t h w"], input_ids: Int[Tensor, "b l"]
    ) -> Float[Tensor, "b l vocab"]:
        """Logits after every token of the prompts, which hold `VIDEO` once per video token."""
        embedded = self.embed(self.see(video_pixel_values), input_ids)
        return self.language_model(inputs_embeds=embedded, use_cache=False).logits

    def see(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b m d"]:
        """The clips as tokens for the language model. They do not depend on the question.

        Raises:
            ValueError: The clips have a single frame, which the model would treat as a picture.
        """
        if video.shape[2] < 2:
            raise ValueError(f"The video has the shape {tuple(video.shape)}; expected 2+ frames.")
        queries = torch.cat([self.query_tokens, self.temporal_query_tokens], 1)
        seen = self.vision_model(video.to(queries.dtype))
        return self.abstractor(queries.expand(len(video), -1, -1), seen.flatten(1, 2))

    def embed(
        self, seen: Float[Tensor, "b m d"], input_ids: Int[Tensor, "b l"]
    ) -> Float[Tensor, "b l d"]:
        """Embedded prompts with the video's tokens in their places.

        Raises:
            ValueError: A prompt has more or fewer places than the video has tokens.
        """
        places = input_ids == VIDEO
        if (counts := set(places.sum(1).tolist())) != {seen.shape[1]}:
            raise ValueError(
                f"The prompts have {sorted(counts)} places for video tokens; expected "
                f"{seen.shape[1]} in each."
            )
        embedded = self.language_model.get_input_embeddings()(input_ids.where(~places, 0))
        return embedded.masked_scatter(places[..., None], seen.to(embedded.dtype))


class VisionTower(nn.Module):
    """ViT-L/14 whose layers mix along time before they attend within each frame.

    Args:
        config: A CLIPVisionConfig.
    """

    def __init__(self, config: Any) -> None:
        super().__init__()
        width, patch = config.hidden_size, config.patch_size
        tokens = 1 + (config.image_size // patch) ** 2
        self.heads = config.num_attention_heads
        self.cls_token = nn.Parameter(torch.empty(1, 1, width))
        self.position_embedding = nn.Parameter(torch.empty(1, tokens, width))
        self.patch_embed = nn.Conv2d(3, width, patch, patch, bias=False)
        self.pre_layernorm = nn.LayerNorm(width, config.layer_norm_eps)
        layers = range(config.num_hidden_layers)
        self.along_time = nn.ModuleList(Temporal(width) for _ in layers)
        self.in_frame = nn.ModuleList(CLIPEncoderLayer(config) for _ in layers)
        self.post_layernorm = nn.LayerNorm(width, config.layer_norm_eps)

    def forward(self, video: Float[Tensor, "b 3 t h w"]) -> Float[Tensor, "b t n d"]:
        clips, _, frames = video.shape[:3]
        patches = self.patch_embed(video.transpose(1, 2).flatten(0, 1)).flatten(2).mT
        hidden = torch.cat([self.cls_token.expand(len(patches), -1, -1), patches], 1)
        hidden = self.pre_layernorm(hidden + self.position_embedding)
        for along_time, in_frame in zip(self.along_time, self.in_frame, strict=True):
            mixed = along_time(hidden.unflatten(0, (clips, frames)))
            hidden = in_frame(hidden + mixed.flatten(0, 1), attention_mask=None)
        # CLIP's own tower normalises the class token alone; this one normalises every token.
        return self.post_layernorm(hidden).unflatten(0, (clips, frames))


class Temporal(nn.Module):
    """A bottleneck with a depthwise convolution over three frames, for the patches.

    The class token is returned unchanged, so that adding the input doubles it, as in training.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ln = nn.LayerNorm(width)
        self.down_proj = nn.Linear(width, width // 2)
        self.conv = nn.Conv1d(width // 2, width // 2, 3, padding=1, groups=width // 2)
        self.up_proj = nn.Linear(width // 2, width)

    def forward(self, hidden: Float[Tensor, "b t n d"]) -> Float[Tensor, "b t n d"]:
        token, patches = hidden.split([1, hidden.shape[2] - 1], 2)
        narrow = self.down_proj(self.ln(patches)).permute(0, 2, 3, 1)  # (b, p, d / 2, t)
        mixed = self.conv(narrow.flatten(0, 1)).view_as(narrow).permute(0, 3, 1, 2)
        mixed = mixed * torch.sigmoid(1.702 * mixed)
        return torch.cat([token, self.up_proj(mixed)], 2)


class Abstractor(nn.Module):
    """Queries that read a clip's tokens and are projected to the language model's width.

    The second half of the queries is temporal; its tokens are added to the first half's.
    """

    def __init__(self, width: int, width_text: int, num_hidden_layers: int, **layer: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            CrossAttention(width, **layer) for _ in range(num_hidden_layers)
        )
        self.visual_fc = nn.Linear(width, width_text)
        self.temporal_visual_fc = nn.Linear(width, width_text)
        self.vit_eos = nn.Parameter(torch.empty(1, 1, width_text))

    def forward(
        self, queries: Float[Tensor, "b q w"], seen: Float[Tensor, "b s w"]
    ) -> Float[Tensor, "b m d"]:
        for layer in self.layers:
            queries = layer(queries, seen)
        still, temporal = queries.chunk(2, 1)
        summed = self.visual_fc(still) + self.temporal_visual_fc(temporal)
        return torch.cat([summed, self.vit_eos.expand(len(summed), -1, -1)], 1)


class CrossAttention(nn.Module):
    """A layer of the abstractor: queries attend to themselves and to the clip, then a SwiGLU."""

    def __init__(
        self, width: int, intermediate_size: int, num_attention_heads: int, layer_norm_eps: float
    ) -> None:
        super().__init__()
        self.heads = num_attention_heads
        # Two thirds, rounded up to a multiple of 256, as in LLaMA.
        inner = -(-(2 * intermediate_size // 3) // 256) * 256
        self.norm1, self.normk, self.norm2 = (nn.LayerNorm(width) for _ in range(3))
        self.query, self.key, self.value, self.out_proj = (
            nn.Linear(width, width) for _ in range(4)
        )
        self.w1, self.w3 = nn.Linear(width, inner), nn.Linear(width, inner)
        self.ffn_ln = nn.LayerNorm(inner, layer_norm_eps)
        self.w2 = nn.Linear(inner, width)

    def forward(
        self, queries: Float[Tensor, "b q w"], seen: Float[Tensor, "b s w"]
    ) -> Float[Tensor, "b q w"]:
        queries = self.norm1(queries)  # As trained, the residual starts after the norm.
        read = torch.cat([queries, self.normk(seen)], 1)
        by_head = (
            projected.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for projected in (self.query(queries), self.key(read), self.value(read))
        )
        attended = F.scaled_dot_product_attention(*by_head).transpose(1, 2).flatten(2)
        hidden = queries + self.out_proj(attended)
        normed = self.norm2(hidden)
        return hidden + self.w2(self.ffn_ln(F.silu(self.w1(normed)) * self.w3(normed)))


def _published_name(name: str) -> str:
    for pattern, published in _NAMES.items():
        name = re.sub("^" + pattern, published, name)
    return re.sub(r"\.[qkv]_proj\.", ".query_key_value.", name) if _JOINT.match(name) else name
