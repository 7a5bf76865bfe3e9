"""A straw man: no network, only the mean colour of what each token covers."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from videorepa.encoders import Encoder, EncoderSpec
from videorepa.errors import UserError
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid


class Pixels(EncoderSpec):
    """Mean colours on a teacher's grid: whatever the teacher knows beyond this is not plain colour.

    Args:
      patch: Pixels along a side that a token covers.
      tubelet: Frames that a token covers.
    """

    name: Literal["pixels"] = "pixels"
    weights: Literal["none"] = "none"
    patch: int = Field(default=16, ge=1)
    tubelet: int = Field(default=2, ge=1)

    def shape(self, clip_frames: int) -> TokenGrid:
        frames, height, width = self.piece
        if frames % self.tubelet or height % self.patch or width % self.patch:
            raise UserError(
                f"The encoder pixels has tubelets of {self.tubelet} frames and patches of "
                f"{self.patch} pixels; the recipe asks for {frames}x{height}x{width}."
            )
        size = self.frames // self.tubelet, self.height // self.patch, self.width // self.patch
        tokens = torch.empty(1, *size, 3, device="meta")
        return TokenGrid(tokens, self.first_frame(clip_frames), self.tubelet)

    def fingerprint(self) -> dict[str, str]:
        return {"encoder": json_digest(self.model_dump())}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        self.shape(self.frames)  # Raises for what cannot work.
        return PixelEncoder(self).to(device)


class PixelEncoder(Encoder):
    """The live encoder. Its tokens are red, green and blue, -1 to 1."""

    mean = std = (0.5, 0.5, 0.5)

    def __init__(self, spec: Pixels) -> None:
        super().__init__(spec, spec.tubelet)
        self.cell = spec.tubelet, spec.patch, spec.patch
        # `Encoder` reads device and dtype off a parameter.
        self.register_parameter("anchor", torch.nn.Parameter(torch.zeros(()), requires_grad=False))

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w 3"]:
        return F.avg_pool3d(video.transpose(1, 2), self.cell).permute(0, 2, 3, 4, 1)
