"""DINOv2, with and without registers, from Hub folders and original files."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from videorepa.encoders import Sizes
from videorepa.encoders._image import ImageSpec
from videorepa.encoders._vit import heads_of, layers_of, load_stock, renamed

# Patterns of original names, and the names in the Hub's folders.
_NAMES = {
    r"(cls_token|mask_token|register_tokens)$": r"embeddings.\1",
    r"pos_embed$": "embeddings.position_embeddings",
    r"patch_embed\.proj\.": "embeddings.patch_embeddings.projection.",
    r"norm\.": "layernorm.",
    r"blocks\.": "encoder.layer.",
    r"(encoder\.layer\.\d+)\.attn\.q\.": r"\1.attention.attention.query.",
    r"(encoder\.layer\.\d+)\.attn\.k\.": r"\1.attention.attention.key.",
    r"(encoder\.layer\.\d+)\.attn\.v\.": r"\1.attention.attention.value.",
    r"(encoder\.layer\.\d+)\.attn\.proj\.": r"\1.attention.output.dense.",
    r"(encoder\.layer\.\d+)\.ls(\d)\.gamma$": r"\1.layer_scale\2.lambda1",
    r"(encoder\.layer\.\d+)\.mlp\.w12\.": r"\1.mlp.weights_in.",
    r"(encoder\.layer\.\d+)\.mlp\.w3\.": r"\1.mlp.weights_out.",
}


class DINOv2(ImageSpec):
    """DINOv2 (arXiv 2304.07193), any size, with or without registers.

    Features are the patches' tokens after the final norm (`x_norm_patchtokens`), as in REPA,
    without class and register tokens. The stock class resizes the position table bicubically,
    without the original code's extra scale by a tenth of a patch.
    """

    name: Literal["dinov2"] = "dinov2"

    family = "DINOv2"
    accepts = (
        "folders of model_type 'dinov2' and 'dinov2_with_registers' such as facebook/dinov2-base, "
        "and original files such as dinov2_vitb14_pretrain.pth"
    )
    model_types = ("dinov2", "dinov2_with_registers")
    published = {
        name.format(*names): Sizes(width, 14)
        for width, *names in (
            (384, "small", "s"),
            (768, "base", "b"),
            (1024, "large", "l"),
            (1536, "giant", "g"),
        )
        for name in (
            "facebook/dinov2-{0}",
            "facebook/dinov2-with-registers-{0}",
            "dinov2_vit{1}14_pretrain.pth",
            "dinov2_vit{1}14_reg4_pretrain.pth",
        )
    }
    prefix = ""
    ignored = re.compile(r"head\.")

    def stock_model(self, path: Path, dtype: torch.dtype) -> Any:
        from transformers import Dinov2Model, Dinov2WithRegistersModel

        if path.is_file():
            original = self.original(path)
            has_registers = "register_tokens" in original
        else:
            original = None
            has_registers = self.config(path)["model_type"] == "dinov2_with_registers"
        stock_class: Any = Dinov2WithRegistersModel if has_registers else Dinov2Model
        if original is None:
            config, weights = stock_class.config_class.from_pretrained(path), None
        else:
            config = stock_class.config_class(**self._config(original))
            weights = renamed(original, _NAMES)
        return load_stock(stock_class, self, path, config, dtype, weights)

    def _config(self, weights: dict[str, Tensor]) -> dict[str, Any]:
        width, patch, _ = self.original_sizes(weights)

        def count(name: str, default: int) -> int:
            """How many tokens a tensor holds. `load_stock` reports it if it does not fit."""
            return max(1, weights[name].numel() // width) if name in weights else default

        config = {
            "hidden_size": width,
            "patch_size": patch,
            "image_size": patch * math.isqrt(count("pos_embed", 2) - 1),
            "num_hidden_layers": layers_of(weights),
            "num_attention_heads": heads_of(width),
            "mlp_ratio": count("blocks.0.mlp.fc1.bias", 4),
            "use_swiglu_ffn": "blocks.0.mlp.w12.weight" in weights,
        }
        if "register_tokens" in weights:
            config["num_register_tokens"] = count("register_tokens", 0)
        return config
