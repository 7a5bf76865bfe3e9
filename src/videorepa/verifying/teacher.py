"""Compares a teacher's features with those of the stock class that reads the same weights."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD, EncoderSpec
from videorepa.encoders._image import ImageSpec
from videorepa.encoders._video import TRAINED_FRAMES, TRAINED_SIDE
from videorepa.encoders._vit import ViTSpec, heads_of
from videorepa.encoders._wrapper import WrapperSpec
from videorepa.system.hub import local_copy
from videorepa.verifying.record import Verification

IMAGES = 2
"""Images that an image teacher is shown."""

ALLOWED = 1e-3
"""The relative difference that counts as equal, at least."""


def innermost(spec: EncoderSpec) -> EncoderSpec:
    """The encoder itself, without what wraps it."""
    while isinstance(spec, WrapperSpec):
        spec = spec.of
    return spec


@torch.no_grad()
def compare_teacher(
    record: Verification, spec: EncoderSpec, device: torch.device, dtype: torch.dtype
) -> None:
    """Compare the features of fixed noise, of the size that the weights were trained on.

    Folders are read by the stock class of their configuration. Original files of video teachers,
    which none reads, are compared with the plain transformer that they describe.
    """
    name = f"teacher {spec.name}"
    if not isinstance(spec, ViTSpec):
        record.add(name, "open", "has no weights of a stock class")
        return
    path = local_copy(spec.source)
    if path.is_dir():
        config = spec.config(path)
        frames = IMAGES if isinstance(spec, ImageSpec) else config.get("num_frames", 16)
        side = config.get("crop_size") or config["image_size"]
    elif isinstance(spec, ImageSpec):
        record.add(name, "open", "no stock class reads this file; its features were not compared")
        return
    else:
        frames, side = TRAINED_FRAMES, _trained_side(spec, path)
    side -= side % spec.sizes().patch
    native = {"frames": frames, "height": side, "width": side, "group": None, "crop": None}
    if isinstance(spec, ImageSpec):
        native["pool"] = 1
    own = spec.model_copy(update=native | {"normalized": False})
    video = torch.rand(1, frames, 3, side, side, generator=torch.Generator().manual_seed(6))
    features = own.load(device, dtype)(video).tokens.flatten(1, 3).float().cpu()
    record.keep(name, features)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    normalised = ((video - mean) / std).to(device, dtype)
    if path.is_dir():
        plain = _stock(path, normalised, isinstance(spec, ImageSpec))
    else:
        plain = _plain(own, normalised.float())
    record.compare(name, {"": (features, plain.float().cpu())}, ALLOWED)


def _trained_side(spec: ViTSpec, path: Path) -> int:
    """The side in pixels of the frames that an original file's table of positions is for."""
    sizes, table = spec.sizes(), spec.original(path).get("pos_embed")
    if table is None:
        return TRAINED_SIDE
    return sizes.patch * math.isqrt(table[..., 0].numel() // (TRAINED_FRAMES // sizes.tubelet))


def _stock(path: Any, video: Tensor, sees_images: bool) -> Tensor:
    """The features that transformers' class of the folder gives."""
    from transformers import AutoModel

    model: Any = AutoModel.from_pretrained(path, dtype=video.dtype).to(video.device).eval()
    if sees_images:
        tokens = model(video[0]).last_hidden_state
        patch = model.config.patch_size
        return tokens[:, -((video.shape[-1] // patch) ** 2) :].flatten(0, 1)[None]
    layers = model.encoder.layer
    kept: list[Tensor] = []
    # The features are what the last layer gives, before any norm.
    layers[-1].register_forward_hook(
        lambda *seen: kept.append(seen[2][0] if isinstance(seen[2], tuple) else seen[2])
    )
    if hasattr(model, "predictor"):
        model(video, skip_predictor=True)
    else:
        model(video)
    return kept[0]


def _plain(spec: Any, video: Float[Tensor, "1 f 3 h w"]) -> Float[Tensor, "1 n d"]:
    """A vision transformer computed from an original file's own names, in float32."""
    weights = {
        key: value.float().to(video.device)
        for key, value in spec.original(local_copy(spec.source)).items()
    }
    patches = spec.patches
    kernel = weights[f"{patches}.weight"]
    grid = F.conv3d(
        video.transpose(1, 2), kernel, weights[f"{patches}.bias"], stride=kernel.shape[2:]
    )
    x = grid.flatten(2).mT
    table = weights.get("pos_embed")
    if table is None:
        from transformers.models.videomae.modeling_videomae import get_sinusoid_encoding_table

        table = get_sinusoid_encoding_table(x.shape[1], x.shape[2])
    x = x + table.to(x)[:, -x.shape[1] :]
    width = x.shape[-1]
    heads = spec.heads or heads_of(width)
    blocks = 1 + max(int(m[1]) for key in weights if (m := re.match(r"blocks\.(\d+)\.", key)))
    for number in range(blocks):
        b = {
            key.removeprefix(f"blocks.{number}."): value
            for key, value in weights.items()
            if key.startswith(f"blocks.{number}.")
        }
        bias = b.get("attn.qkv.bias")
        if bias is None and "attn.q_bias" in b:
            bias = torch.cat([b["attn.q_bias"], torch.zeros(width).to(x), b["attn.v_bias"]])
        normed = F.layer_norm(x, (width,), b["norm1.weight"], b["norm1.bias"], 1e-6)
        joint = F.linear(normed, b["attn.qkv.weight"], bias)
        q, k, v = joint.unflatten(2, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
        mixed = ((q @ k.mT) * (width // heads) ** -0.5).softmax(-1) @ v
        x = x + F.linear(
            mixed.transpose(1, 2).flatten(2), b["attn.proj.weight"], b["attn.proj.bias"]
        )
        normed = F.layer_norm(x, (width,), b["norm2.weight"], b["norm2.bias"], 1e-6)
        inner = F.gelu(F.linear(normed, b["mlp.fc1.weight"], b["mlp.fc1.bias"]))
        x = x + F.linear(inner, b["mlp.fc2.weight"], b["mlp.fc2.bias"])
    return x
