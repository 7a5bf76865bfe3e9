"""DINOv3, from a transformers folder or the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch

from videorepa.encoders import Sizes
from videorepa.encoders._image import ImageSpec
from videorepa.encoders._vit import load_stock


class DINOv3(ImageSpec):
    """DINOv3 (arXiv 2508.10104), the vision transformers of any size.

    Features are the patches' tokens after the final norm (`x_norm_patchtokens`), as REPA takes
    DINOv2's, without class and register tokens.
    """

    name: Literal["dinov3"] = "dinov3"

    family = "DINOv3"
    accepts = "folders of model_type 'dinov3_vit' such as facebook/dinov3-vitb16-pretrain-lvd1689m"
    model_types = ("dinov3_vit",)
    published = {
        "facebook/dinov3-vits16-pretrain-lvd1689m": Sizes(384, 16),
        "facebook/dinov3-vits16plus-pretrain-lvd1689m": Sizes(384, 16),
        "facebook/dinov3-vitb16-pretrain-lvd1689m": Sizes(768, 16),
        "facebook/dinov3-vitl16-pretrain-lvd1689m": Sizes(1024, 16),
        "facebook/dinov3-vith16plus-pretrain-lvd1689m": Sizes(1280, 16),
        "facebook/dinov3-vit7b16-pretrain-lvd1689m": Sizes(4096, 16),
    }

    def stock_model(self, path: Path, dtype: torch.dtype) -> Any:
        from transformers import DINOv3ViTConfig, DINOv3ViTModel

        config = DINOv3ViTConfig.from_pretrained(path)
        return load_stock(DINOv3ViTModel, self, path, config, dtype)
