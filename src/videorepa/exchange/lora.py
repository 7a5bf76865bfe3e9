"""Writes LoRA files that diffusers and ComfyUI read, with the strength in the weights."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from videorepa.errors import UserError

LORA_FILE = "pytorch_lora_weights.safetensors"
"""The name under which diffusers looks for a LoRA in a folder."""

COMFYUI_FILE = "comfyui_lora.safetensors"

_SAME = r"\g<0>"

_LTX = {
    r"transformer_blocks\.\d+\.attn[12]\.to_([qkv]|out\.0)": _SAME,
    r"transformer_blocks\.\d+\.ff\.net\.(0\.proj|2)": _SAME,
}

_COMFYUI_NAMES: dict[str, dict[str, str]] = {
    "CogVideoXTransformer3DModel": {
        r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.\2",
        r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.attn_out",
        r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"blocks.\1.ff_proj",
        r"transformer_blocks\.(\d+)\.ff\.net\.2": r"blocks.\1.ff_out",
    },
    "WanTransformer3DModel": {
        r"blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.self_attn.\2",
        r"blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.self_attn.o",
        r"blocks\.(\d+)\.attn2\.to_([qkv])": r"blocks.\1.cross_attn.\2",
        r"blocks\.(\d+)\.attn2\.to_out\.0": r"blocks.\1.cross_attn.o",
        r"blocks\.(\d+)\.attn2\.add_([kv])_proj": r"blocks.\1.cross_attn.\2_img",
        r"blocks\.(\d+)\.ffn\.net\.0\.proj": r"blocks.\1.ffn.0",
        r"blocks\.(\d+)\.ffn\.net\.2": r"blocks.\1.ffn.2",
    },
    "LTXVideoTransformer3DModel": _LTX,
    "LTX2VideoTransformer3DModel": _LTX,
    "Kandinsky5Transformer3DModel": {
        r"(visual|text)_transformer_blocks\.\d+\.(self|cross)_attention\.(to_\w+|out_layer)": _SAME,
        r"(visual|text)_transformer_blocks\.\d+\.feed_forward\.(in|out)_layer": _SAME,
    },
    "CosmosTransformer3DModel": {
        r"transformer_blocks\.(\d+)\.attn1\.to_([qkv])": r"blocks.\1.self_attn.\2_proj",
        r"transformer_blocks\.(\d+)\.attn1\.to_out\.0": r"blocks.\1.self_attn.output_proj",
        r"transformer_blocks\.(\d+)\.attn2\.to_([qkv])": r"blocks.\1.cross_attn.\2_proj",
        r"transformer_blocks\.(\d+)\.attn2\.to_out\.0": r"blocks.\1.cross_attn.output_proj",
        r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj": r"blocks.\1.mlp.layer1",
        r"transformer_blocks\.(\d+)\.ff\.net\.2": r"blocks.\1.mlp.layer2",
    },
}
"""How ComfyUI names the layers of a diffusers transformer: for each class, the pattern of a layer's
name in diffusers, and the name in ComfyUI's own class of the model (its folder comfy/ldm).

Models whose query, key and value are one layer in ComfyUI are left out."""


@dataclass(frozen=True)
class Adapter:
    """A LoRA whose strength is in its weights: each layer's weight grows by up @ down.

    A LoRA file may state rank and alpha in its header or beside the weights. Several public loaders
    read neither (diffusers' `load_lora_adapter` of a file, `load_lora_weights` of a dict) and take
    alpha to be the rank. So in the files that this class writes, alpha is the rank.

    Args:
      layers: By name of the layer, down (rank, in, ...) and up (out, rank, ...).
    """

    layers: dict[str, tuple[Tensor, Tensor]]

    @classmethod
    def scaled(cls, layers: dict[str, tuple[Tensor, Tensor]], scale: float) -> Adapter:
        """Make the adapter that adds scale * up @ down, where scale is alpha / rank.

        A power of two changes no digit of a weight. With any other scale `up` becomes float32,
        since the products would be rounded once more in a shorter dtype.
        """
        is_exact = math.frexp(scale)[0] == 0.5
        return cls(
            {
                name: (down, (up.float() * scale).to(up.dtype if is_exact else torch.float32))
                for name, (down, up) in layers.items()
            }
        )

    @classmethod
    def of(cls, transformer: Any) -> Adapter:
        """Extract what `add_lora` put into a transformer and training changed."""
        from peft.utils import get_peft_model_state_dict

        state, config = get_peft_model_state_dict(transformer), transformer.peft_config["default"]
        names = [key.removesuffix(".lora_A.weight") for key in state if ".lora_A." in key]
        layers = {
            name: (state[f"{name}.lora_A.weight"], state[f"{name}.lora_B.weight"]) for name in names
        }
        return cls.scaled(layers, config.lora_alpha / config.r)

    def put_into(self, transformer: Any) -> None:
        """Give the weights back to a transformer that `of` took them from."""
        from peft.utils import set_peft_model_state_dict

        config = transformer.peft_config["default"]
        scale = config.lora_alpha / config.r
        state = {}
        for name, (down, up) in self.layers.items():
            state |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up.float() / scale}
        set_peft_model_state_dict(transformer, state)

    @property
    def rank(self) -> int:
        """The rank of every layer."""
        (rank,) = {len(down) for down, _ in self.layers.values()}
        return rank

    def to(self, dtype: torch.dtype) -> Adapter:
        return Adapter(
            {name: (down.to(dtype), up.to(dtype)) for name, (down, up) in self.layers.items()}
        )

    def save_for_diffusers(self, path: Path) -> None:
        """Write the file in the layout that diffusers itself writes.

        The header holds rank, alpha and the layers' names. It leaves out peft's other settings,
        since another version of peft would refuse them.
        """
        weights = {
            f"transformer.{name}.lora_{part}.weight": matrix.detach().contiguous()
            for name, pair in self.layers.items()
            for part, matrix in zip("AB", pair, strict=True)
        }
        settings = {"r": self.rank, "lora_alpha": self.rank, "target_modules": list(self.layers)}
        about = json.dumps({f"transformer.{key}": value for key, value in settings.items()})
        save_file(weights, path, {"lora_adapter_metadata": about})

    def save_for_comfyui(self, path: Path, names: dict[str, str]) -> None:
        """Write the file in the layout that ComfyUI's loader takes for any model.

        Alpha is beside each layer's two matrices. There is no header, because diffusers reads this
        layout for some models and would apply alpha a second time.

        Args:
          path: The file to write.
          names: ComfyUI's name of each layer, from `comfyui_names`.
        """
        weights = {}
        for name, (down, up) in self.layers.items():
            prefix = f"diffusion_model.{names[name]}"
            weights[f"{prefix}.lora_down.weight"] = down.detach().contiguous()
            weights[f"{prefix}.lora_up.weight"] = up.detach().contiguous()
            weights[f"{prefix}.alpha"] = torch.tensor(float(self.rank))
        save_file(weights, path)


def comfyui_names(kind: str, layers: Iterable[str]) -> dict[str, str]:
    """Translate names of layers from diffusers to ComfyUI.

    Args:
      kind: The transformer's class in diffusers.
      layers: Names of its layers.

    Returns:
      ComfyUI's names by diffusers' names.

    Raises:
      UserError: `_COMFYUI_NAMES` lacks the class or a layer.
    """
    patterns = _COMFYUI_NAMES.get(kind)
    if patterns is None:
        raise UserError(
            f"videorepa does not know ComfyUI's names for the layers of {kind}, only for those of "
            f"{', '.join(_COMFYUI_NAMES)}. Export in the format diffusers."
        )
    names = {}
    for layer in layers:
        matches = ((re.fullmatch(pattern, layer), name) for pattern, name in patterns.items())
        named = [match.expand(name) for match, name in matches if match]
        if not named:
            raise UserError(
                f"videorepa does not know ComfyUI's name for the layer {layer} of {kind}. Export "
                "in the format diffusers, or train on attention and feed-forward layers of blocks "
                "alone."
            )
        names[layer] = named[0]
    return names
