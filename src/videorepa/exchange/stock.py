"""Runs an export in stock diffusers, in a process of its own, to compare the outputs."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from videorepa.errors import UserError
from videorepa.recipe import Recipe

# Runs in a process that does not import videorepa, as a user of the export would write it. A LoRA
# for ComfyUI is added to diffusers' layers in the way in which ComfyUI adds it to its own.
_STOCK = """
import json, sys
import diffusers, torch
from safetensors.torch import load_file, save_file
pipeline_class, model_class, product, base, part, names, inputs, answer = sys.argv[1:]
pipeline_class, model_class = getattr(diffusers, pipeline_class), getattr(diffusers, model_class)
if not product.endswith(".safetensors"):
    transformer = model_class.from_pretrained(product)
else:
    transformer = model_class.from_pretrained(base, subfolder=part)
    names = json.load(open(names))
    if names:
        lora = load_file(product)
        for layer, name in names.items():
            up, down, alpha = (
                lora.pop(f"diffusion_model.{name}.{part}").float()
                for part in ("lora_up.weight", "lora_down.weight", "alpha")
            )
            weight = transformer.get_submodule(layer).weight.data
            change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            weight += alpha / down.shape[0] * change
        assert not lora, "weights without a layer"
    else:
        weights, metadata = pipeline_class.lora_state_dict(product, return_lora_metadata=True)
        pipeline_class.load_lora_into_transformer(weights, transformer, metadata=metadata)
arguments = torch.load(inputs, weights_only=True)
with torch.no_grad():
    sample = transformer.to(torch.float32).eval()(**arguments, return_dict=False)[0]
save_file({"sample": sample.contiguous()}, answer)
assert "videorepa" not in sys.modules
"""


def inputs(backbone: Any, recipe: Recipe) -> dict[str, Any]:
    """Draw arguments for the recipe's transformer, the same ones every time.

    They are of the smallest clip on which every weight is used: the published size would take a
    large model an hour on a CPU.
    """
    spec, draw = recipe.backbone, torch.Generator().manual_seed(0)
    size = spec.least_size()
    noisy = torch.randn(1, *spec.shapes(size).latents, generator=draw)
    text = {
        name: torch.randn(1, *like.shape, generator=draw)
        if like.is_floating_point()
        else torch.ones(1, *like.shape, dtype=like.dtype)
        for name, like in spec.raw_text().items()
    }
    arguments = backbone.inputs(noisy, text, torch.tensor([500]))
    if not spec.takes_image:
        return arguments
    # Without an image some weights would not be used.
    stored = {
        name: torch.randn(1, *like.shape, generator=draw) for name, like in spec.image(size).items()
    }
    moments = torch.randn(1, *spec.moments(size), generator=draw)
    return backbone.shown(arguments, noisy, backbone.first_frames(stored, moments))


@torch.no_grad()
def output(transformer: Any, arguments: dict[str, Any]) -> Tensor:
    return transformer.eval()(**arguments, return_dict=False)[0]


def stock_output(
    product: Path,
    classes: tuple[str, str],
    base: tuple[str, str],
    names: dict[str, str],
    arguments: dict[str, Any],
) -> Tensor:
    """Compute the output of an exported transformer with stock diffusers.

    Args:
      product: The exported file or folder.
      classes: Names of the pipeline's and the transformer's classes in diffusers.
      base: The base model's folder, and the name of the transformer's folder in it.
      names: ComfyUI's names of a LoRA's layers by diffusers' names; empty for other exports.
      arguments: The transformer's arguments.

    Raises:
      UserError: diffusers cannot load the export.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("names.json", "inputs", "answer")]
        paths[0].write_text(json.dumps(names))
        torch.save(arguments, paths[1])
        done = subprocess.run(
            [sys.executable, "-c", _STOCK, *classes, product, *base, *paths],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise UserError(f"Stock diffusers cannot load the export:\n{last}")
        return load_file(paths[2])["sample"]
