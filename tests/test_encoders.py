"""Teachers: features equal to the published ones, in every file layout."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD, load_encoder
from videorepa.errors import UserError


def test_videomaev2_gives_the_published_features(golden: Path) -> None:
    given = load_file(golden / "videomaev2_tiny.io.safetensors")
    encoder = load_encoder(
        "videomae",
        weights=golden / "videomaev2_tiny.pth",
        frames=48,
        height=64,
        width=96,
        normalized=True,
    )
    grid = encoder(given["video"].permute(0, 2, 1, 3, 4))
    assert (grid.size, grid.start, grid.stride) == ((24, 4, 6), 0, 2)
    error = (grid.tokens.flatten(1, 3) - given["features"]).norm() / given["features"].norm()
    assert error < 1e-5


def as_original(folder: Path, path: Path) -> Path:
    """The weights of a transformers folder in the original file's names, wrapped as published."""
    from transformers import VideoMAEModel

    state = VideoMAEModel.from_pretrained(folder).state_dict()
    renamed = {}
    for key, value in state.items():
        key = key.replace("embeddings.patch_embeddings.projection", "patch_embed.proj")
        key = key.replace("encoder.layer", "blocks").replace("layernorm_before", "norm1")
        key = key.replace("layernorm_after", "norm2").replace("attention.output.dense", "attn.proj")
        key = key.replace("intermediate.dense", "mlp.fc1").replace("output.dense", "mlp.fc2")
        renamed["module." + key] = value
    for block in range(2):
        prefix = f"module.blocks.{block}.attention.attention."
        rows = [renamed.pop(f"{prefix}{part}.weight") for part in ("query", "key", "value")]
        renamed[f"module.blocks.{block}.attn.qkv.weight"] = torch.cat(rows)
        for part, name in (("query", "q_bias"), ("value", "v_bias")):
            renamed[f"module.blocks.{block}.attn.{name}"] = renamed.pop(f"{prefix}{part}.bias")
    renamed = {k: v for k, v in renamed.items() if "layernorm" not in k}
    torch.save({"module": renamed | {"module.head.weight": torch.zeros(2, 2)}}, path)
    return path


def test_a_folder_and_an_original_file_give_stock_features(twins, tmp_path: Path) -> None:
    from transformers import VideoMAEModel

    stock = VideoMAEModel.from_pretrained(twins["teacher"])
    stock.layernorm = None
    video = torch.rand(2, 9, 3, 16, 16)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        expected = stock((video[:, 1:] - mean) / std).last_hidden_state
    size = {"frames": 8, "height": 16, "width": 16}
    grid = load_encoder("videomae", twins["teacher"], **size)(video)
    assert (grid.start, grid.stride, grid.size) == (1, 2, (4, 2, 2))
    torch.testing.assert_close(grid.tokens.flatten(1, 3), expected)
    # The original layout has no position table of this size; blocks and names are what is tested.
    original = load_encoder(
        "videomae", as_original(twins["teacher"], tmp_path / "t.pth"), heads=2, **size
    )
    original.model.embeddings.position_embeddings = stock.embeddings.position_embeddings
    for layer in original.model.encoder.layer:
        layer.layernorm_before.eps = layer.layernorm_after.eps = stock.config.layer_norm_eps
    torch.testing.assert_close(original(video).tokens.flatten(1, 3), expected)


def test_frames_are_resized_bicubically_before_they_are_normalised(twins) -> None:
    size = {"frames": 8, "height": 16, "width": 16}
    video = torch.rand(1, 8, 3, 40, 24)
    small = F.interpolate(video[0], (16, 16), mode="bicubic", align_corners=False)[None]
    encoder = load_encoder("videomae", twins["teacher"], **size)
    torch.testing.assert_close(encoder(video).tokens, encoder(small).tokens)


def test_position_tables_are_resized_to_other_grids(twins) -> None:
    encoder = load_encoder("videomae", twins["teacher"], frames=16, height=8, width=32)
    assert encoder(torch.rand(1, 16, 3, 8, 32)).size == (8, 1, 4)


def test_a_clip_that_is_too_short_is_refused(twins) -> None:
    encoder = load_encoder("videomae", twins["teacher"], frames=8, height=16, width=16)
    with pytest.raises(UserError, match="wants 8 frames and the clip has 7"):
        encoder(torch.rand(1, 7, 3, 16, 16))


def test_sizes_that_the_patches_do_not_divide_are_refused(twins) -> None:
    with pytest.raises(UserError, match="multiples of 8"):
        load_encoder("videomae", twins["teacher"], frames=8, height=12, width=16)
