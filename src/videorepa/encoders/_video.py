"""Video teachers with tubelets and a position table, on the stock VideoMAEModel."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from videorepa.encoders import Sizes
from videorepa.encoders._vit import ViT, ViTSpec, heads_of, layers_of, load_stock, renamed
from videorepa.errors import UserError
from videorepa.settings.bounds import Layers

TRAINED_FRAMES, TRAINED_SIDE = 16, 224
"""Frames, and pixels along a side, that the models of original files were trained on."""

_NAMES = {
    r"patch_embed\.proj\.(1\.)?": "embeddings.patch_embeddings.projection.",
    r"blocks\.(\d+)\.norm1\.": r"encoder.layer.\1.layernorm_before.",
    r"blocks\.(\d+)\.norm2\.": r"encoder.layer.\1.layernorm_after.",
    r"blocks\.(\d+)\.attn\.q(\.|_)": r"encoder.layer.\1.attention.attention.query.",
    r"blocks\.(\d+)\.attn\.k\.": r"encoder.layer.\1.attention.attention.key.",
    r"blocks\.(\d+)\.attn\.v(\.|_)": r"encoder.layer.\1.attention.attention.value.",
    r"blocks\.(\d+)\.attn\.proj\.": r"encoder.layer.\1.attention.output.dense.",
    r"blocks\.(\d+)\.mlp\.fc1\.": r"encoder.layer.\1.intermediate.dense.",
    r"blocks\.(\d+)\.mlp\.fc2\.": r"encoder.layer.\1.output.dense.",
}


class VideoViT(ViT):
    """A live video teacher: the stock VideoMAEModel."""

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        return self.model(video).last_hidden_state.unflatten(1, self.size)


class VideoSpec(ViTSpec):
    """A video transformer that cuts a clip into tubelets and adds a table of positions.

    Attributes:
      heads: Attention heads of an original file's model; by default as many as the published
        models of its width have.
      spatial: How the family resizes its table: "bicubic" in space and then linearly in time, or
        "trilinear" in one step.
    """

    live: ClassVar = VideoViT
    kernel: ClassVar[int] = 3
    spatial: ClassVar[Literal["bicubic", "trilinear"]] = "bicubic"

    heads: Layers | None = None

    def stock_model(self, path: Path, dtype: torch.dtype) -> Any:
        from transformers import VideoMAEConfig, VideoMAEModel

        config: Any
        if path.is_file():
            original = self.original(path)
            config = self._config(original, path)
            # The stock class has no bias for keys and needs none: a bias b adds q.b to all scores
            # of a query q, and softmax cancels what they share.
            weights = {
                key: value
                for key, value in renamed(original, _NAMES).items()
                if key != "pos_embed" and not key.endswith(".key.bias")
            }
        else:
            original, weights = {}, None
            config = VideoMAEConfig.from_pretrained(path)
        table = self.positions(config, original, path)
        config.image_size = list(self.piece[1:])
        # The stock class computes a table number by number. It is replaced below, so it is kept
        # as short as possible.
        config.num_frames = config.tubelet_size
        # Features are the residual stream after the last block: no final norm.
        config.use_mean_pooling = True
        model: Any = load_stock(VideoMAEModel, self, path, config, dtype, weights)
        size = Sizes(config.hidden_size, config.patch_size, config.tubelet_size).grid(*self.piece)
        resized = resize_positions(table, size, self.spatial)
        model.embeddings.position_embeddings = resized.flatten(0, 2)[None]
        return model

    def positions(
        self, config: Any, original: dict[str, Tensor], path: Path
    ) -> Float[Tensor, "t h w d"]:
        """The position table of the trained grid; by default the one in the original file.

        Raises:
          UserError: The file holds no table of the expected size.
        """
        stored = original.get("pos_embed", torch.empty(0))
        steps = config.num_frames // config.tubelet_size
        side = math.isqrt(stored.numel() // (steps * config.hidden_size))
        size = (steps, side, side, config.hidden_size)
        if not side or stored.numel() != math.prod(size):
            raise UserError(
                f"{path} does not fit {self.family}: pos_embed has the shape "
                f"{tuple(stored.shape)}; expected {steps} square frames of tokens that are "
                f"{config.hidden_size} wide. The encoder {self.name} loads {self.accepts}."
            )
        return stored.float().reshape(size)

    def _config(self, weights: dict[str, Tensor], path: Path) -> Any:
        from transformers import VideoMAEConfig

        sizes = self.original_sizes(weights)
        inner = weights.get("blocks.0.mlp.fc1.weight")
        heads = self.heads or heads_of(sizes.width)
        if sizes.width % heads:
            raise UserError(
                f"encoder.heads is {heads}, which does not divide the width {sizes.width} of "
                f"{path}. Set it to what the model was made with."
            )
        return VideoMAEConfig(
            hidden_size=sizes.width,
            patch_size=sizes.patch,
            tubelet_size=sizes.tubelet,
            num_hidden_layers=layers_of(weights),
            num_attention_heads=heads,
            intermediate_size=4 * sizes.width if inner is None else inner.shape[0],
            num_frames=TRAINED_FRAMES,
            image_size=TRAINED_SIDE,
            layer_norm_eps=1e-6,
        )


def resize_positions(
    table: Float[Tensor, "t h w d"],
    size: tuple[int, int, int],
    spatial: Literal["bicubic", "trilinear"],
) -> Float[Tensor, "t2 h2 w2 d"]:
    """Resize a position table to another grid, as the family's published code does.

    Args:
      table: The table of the trained grid.
      size: Steps, rows and columns of the new grid.
      spatial: "bicubic" in space and then linearly in time, or "trilinear" in one step.
    """
    frames = table.permute(0, 3, 1, 2)
    if spatial == "bicubic":
        frames = F.interpolate(frames, size[1:], mode="bicubic", align_corners=False)
    volume = frames.transpose(0, 1)[None]
    volume = F.interpolate(volume, size, mode="trilinear", align_corners=False)
    return volume[0].permute(1, 2, 3, 0)
