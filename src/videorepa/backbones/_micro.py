"""The lab's model that continues an image: the shipped one with a wider input and a LoRA.

The package holds the LoRA alone, a few megabytes. The whole model is put together when it is first
asked for, and kept in the user's cache.
"""

from __future__ import annotations

import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from videorepa.system.fingerprint import json_digest, weights_digest
from videorepa.system.hub import micro_weights, stock_loading, user_cache

FROM_IMAGE = "micro-i2v"
"""Names the model in recipes."""


def widened(transformer: Any) -> Any:
    """A text-to-video transformer with channels for an image beside those of the latents.

    Their weights are 0, so that it gives what it gave, whatever the image.
    """
    config = dict(transformer.config)
    wider = type(transformer).from_config(config | {"in_channels": 2 * config["in_channels"]})
    weights = transformer.state_dict()
    name = "patch_embed.proj.weight"
    weights[name] = torch.cat([weights[name], torch.zeros_like(weights[name])], 1)
    wider.load_state_dict(weights)
    return wider


@cache
def image_model() -> Path:
    """The folder of the model that continues an image, put together if it is not there."""
    base, lora = micro_weights("cogvideox"), micro_weights("cogvideox-i2v.safetensors")
    digest = json_digest([weights_digest(base), weights_digest(lora)])
    folder = user_cache() / f"{FROM_IMAGE}-{digest}"
    if folder.exists():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".tmp-") as scratch:
        _put_together(base, lora, Path(scratch) / "model")
        try:
            os.rename(Path(scratch) / "model", folder)
        except OSError:
            if not folder.exists():  # Else another process was quicker.
                raise
    return folder


def _put_together(base: Path, lora: Path, out: Path) -> None:
    from diffusers import CogVideoXImageToVideoPipeline, CogVideoXPipeline

    with stock_loading("The lab's model that continues an image", "Install the package again."):
        pipeline: Any = CogVideoXPipeline.from_pretrained(base, torch_dtype=torch.bfloat16)
        transformer = widened(pipeline.transformer)
        transformer.load_lora_adapter(lora.parent, weight_name=lora.name)
        # In float64, so that every machine rounds to the same weights. bfloat16 would round a part
        # of the LoRA away.
        transformer.double().fuse_lora()
        transformer.unload_lora()
        parts = pipeline.components | {"transformer": transformer.to(torch.float32)}
        CogVideoXImageToVideoPipeline(**parts).save_pretrained(out)
