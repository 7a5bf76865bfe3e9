"""V-JEPA 2, from a transformers folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.encoders import Sizes
from videorepa.encoders._vit import ViT, ViTSpec, load_stock


class VJEPA2ViT(ViT):
    """A live V-JEPA 2 on frames that need not be square.

    Positions are rotary: the stock class computes a token's step, row and column from its number on
    a square grid. Here tokens get the numbers that they have on the smallest square around the
    frame.
    """

    numbers: Tensor

    def __init__(self, spec: VJEPA2, model: Any) -> None:
        super().__init__(spec, model)
        steps, rows, columns = self.size
        side = max(rows, columns)
        square = torch.arange(steps * side * side).view(steps, side, side)
        self.register_buffer("numbers", square[:, :rows, :columns].flatten(), persistent=False)

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        tokens = self.model.embeddings(video)
        numbers = self.numbers.expand(len(video), -1)
        for layer in self.model.layer:
            tokens, _ = layer(tokens, numbers)
        return tokens.unflatten(1, self.size)


class VJEPA2(ViTSpec):
    """V-JEPA 2 (arXiv 2506.09985), any size.

    Features are the encoder's residual stream after the last block, before the final norm. The
    predictor is not run.
    """

    name: Literal["vjepa2"] = "vjepa2"

    live = VJEPA2ViT
    family = "V-JEPA 2"
    accepts = "folders of model_type 'vjepa2' such as facebook/vjepa2-vitl-fpc64-256"
    model_types = ("vjepa2",)
    published = {
        "facebook/vjepa2-vitl-fpc64-256": Sizes(1024, 16, 2),
        "facebook/vjepa2-vith-fpc64-256": Sizes(1280, 16, 2),
        "facebook/vjepa2-vitg-fpc64-256": Sizes(1408, 16, 2),
        "facebook/vjepa2-vitg-fpc64-384": Sizes(1408, 16, 2),
    }

    def stock_model(self, path: Path, dtype: torch.dtype) -> Any:
        from transformers import VJEPA2Config, VJEPA2Model

        config = VJEPA2Config.from_pretrained(path)
        # The side of the square on which the stock class numbers tokens; see VJEPA2ViT.
        config.crop_size = max(self.piece[1:])
        config.pred_num_hidden_layers = 0
        model: Any = load_stock(VJEPA2Model, self, path, config, dtype, unused="predictor.")
        return model.encoder
