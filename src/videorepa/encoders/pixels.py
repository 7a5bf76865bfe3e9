"""A straw man: no network, only the mean colour of what each token covers."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from videorepa.encoders import Encoder, EncoderSpec, Sizes
from videorepa.settings.bounds import Frames, Side
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid


class Pixels(EncoderSpec):
    """Raw pixels on a teacher's grid. What the teacher's features add to these, it has learnt.

    Args:
      patch: Pixels along a side of a token, as the teacher's.
      tubelet: Frames that a token covers, as the teacher's.
      pool: Tubelets that are averaged into a step; a first one that is left over keeps a step of
        its own, as an image teacher's first frame does.
    """

    name: Literal["pixels"] = "pixels"
    weights: Literal["none"] = "none"
    patch: Side = 16
    tubelet: Frames = 2
    pool: Frames = 1

    @classmethod
    def on_grid_of(cls, teacher: EncoderSpec) -> Pixels:
        """The pixels that a teacher sees, averaged over what each of its tokens covers."""
        grid = teacher.shape(teacher.frames)
        # All that the first step covers: fewer frames than the others where it is left over.
        tubelet = grid.start + grid.stride
        return cls(
            frames=teacher.frames,
            height=teacher.height,
            width=teacher.width,
            patch=teacher.height // grid.size[1],
            tubelet=tubelet,
            pool=grid.stride // tubelet,
        )

    def shape(self, clip_frames: int) -> TokenGrid:
        sizes = Sizes(3, self.patch, self.tubelet)
        return self.patch_grid(sizes, clip_frames).pooled(self.pool)

    def fingerprint(self) -> dict[str, str]:
        # Features that were stored before there was a pool stay valid.
        unused = {"pool"} if self.pool == 1 else set()
        return {"encoder": json_digest(self.model_dump(exclude=unused))}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        self.shape(self.frames)  # Raises for sizes that do not divide.
        return PixelEncoder(self).to(device)


class PixelEncoder(Encoder):
    """Averages colours, from -1 to 1, over each token's patch and tubelet."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, spec: Pixels) -> None:
        super().__init__(spec, spec.tubelet)
        self.cell, self.pool = (spec.tubelet, spec.patch, spec.patch), spec.pool
        # `Encoder` takes its device and dtype from its parameters.
        self.register_parameter("place", torch.nn.Parameter(torch.zeros(()), requires_grad=False))

    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return super().forward(video).pooled(self.pool)

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w 3"]:
        return F.avg_pool3d(video.transpose(1, 2), self.cell).permute(0, 2, 3, 4, 1)
