"""V-JEPA, from original files."""

from __future__ import annotations

from typing import Literal

from videorepa.encoders import Sizes
from videorepa.encoders._video import VideoSpec


class VJEPA(VideoSpec):
    """V-JEPA (arXiv 2404.08471), any size: the target encoder of a `.pth.tar`.

    Features are the residual stream after the last block, without the final norm.
    """

    name: Literal["vjepa"] = "vjepa"

    family = "V-JEPA"
    accepts = "original files of V-JEPA such as vitl16.pth.tar"
    published = {
        "vitl16.pth.tar": Sizes(1024, 16, 2),
        "vith16.pth.tar": Sizes(1280, 16, 2),
        "vith16-384.pth.tar": Sizes(1280, 16, 2),
    }
    wrappers = ("target_encoder",)
    prefix = r"module\.backbone\."
    spatial = "trilinear"

    @property
    def relation_margin(self) -> float:
        """0.05 (VideoREPA, arXiv 2505.23656)."""
        return 0.05
