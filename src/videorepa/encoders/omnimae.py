"""OmniMAE, from original files."""

from __future__ import annotations

from typing import Literal

from videorepa.encoders import Sizes
from videorepa.encoders._video import VideoSpec


class OmniMAE(VideoSpec):
    """OmniMAE (arXiv 2206.08356), any size: the trunk of a `.torch` file.

    Features are the residual stream after the last block, without the final norm.
    """

    name: Literal["omnimae"] = "omnimae"

    family = "OmniMAE"
    accepts = "original files of OmniMAE such as vitb_pretrain.torch"
    published = {
        "vitb_pretrain.torch": Sizes(768, 16, 2),
        "vitl_pretrain.torch": Sizes(1024, 16, 2),
        "vith_pretrain.torch": Sizes(1280, 14, 2),
    }
    prefix = r"trunk\."
    patches = "patch_embed.proj.1"

    @property
    def relation_margin(self) -> float:
        """0 (VideoREPA, arXiv 2505.23656)."""
        return 0.0
