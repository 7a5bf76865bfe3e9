"""VideoMAE and VideoMAEv2, from Hub folders and original files."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.encoders import Sizes
from videorepa.encoders._video import VideoSpec


class VideoMAE(VideoSpec):
    """VideoMAE (arXiv 2203.12602) or VideoMAEv2 (arXiv 2303.16727), any size.

    Features are the residual stream after the last block, without a final norm.

    Args:
      version: 1 or 2; only the default margin depends on it. The two share their files' layout, so
        by default the name of the weights decides: 1 if it contains "videomae" and neither "v2",
        "k710" nor "giant", else 2, as in the published runs.
    """

    name: Literal["videomae"] = "videomae"
    version: Literal[1, 2] | None = None

    family = "VideoMAE"
    accepts = (
        "folders of model_type 'videomae', and original files of VideoMAE and VideoMAEv2 such as "
        "vit_b_k710_dl_from_giant.pth"
    )
    model_types = ("videomae",)
    published = {
        "vit_s_k710_dl_from_giant.pth": Sizes(384, 16, 2),
        "vit_b_k710_dl_from_giant.pth": Sizes(768, 16, 2),
        "vit_g_hybrid_pt_1200e.pth": Sizes(1408, 14, 2),
        "MCG-NJU/videomae-base": Sizes(768, 16, 2),
        "MCG-NJU/videomae-large": Sizes(1024, 16, 2),
    }
    wrappers = ("module", "model", "state_dict")
    prefix = r"(module\.)?(encoder\.)?"

    @property
    def relation_margin(self) -> float:
        """0 for VideoMAE, 0.1 for VideoMAEv2 (VideoREPA, arXiv 2505.23656)."""
        name = Path(self.source).name.lower()
        is_first = "videomae" in name and not any(m in name for m in ("v2", "k710", "giant"))
        return 0.0 if (self.version or (1 if is_first else 2)) == 1 else 0.1

    def positions(
        self, config: Any, original: dict[str, Tensor], path: Path
    ) -> Float[Tensor, "t h w d"]:
        """The fixed sinusoid table of the trained grid, which no file holds."""
        side = config.image_size // config.patch_size
        size = (config.num_frames // config.tubelet_size, side, side)
        return sinusoid_table(int(np.prod(size)), config.hidden_size).unflatten(0, size)


def sinusoid_table(positions: int, width: int) -> Float[Tensor, "n d"]:
    """The sinusoid table of VideoMAE, computed at once instead of number by number.

    With c the channel rounded down to even, the angle is position / 10000^(c / width). Even
    channels hold its sine and odd ones its cosine.
    """
    channel = np.arange(width)
    angle = np.arange(positions)[:, None] / np.power(10000, 2 * (channel // 2) / width)
    return torch.from_numpy(np.where(channel % 2, np.cos(angle), np.sin(angle))).float()
