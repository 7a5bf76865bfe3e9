"""A straw man: no network and no pixels, only where each token is."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn

from videorepa.encoders import Encoder, EncoderSpec, Sizes
from videorepa.settings.bounds import Frames, Side
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid


class Places(EncoderSpec):
    """Where tokens are on a teacher's grid, the same in every clip. A teacher has to beat it.

    A token is the sines and cosines of its step, row and column, a third of the channels for each,
    as in transformers' tables of positions (arXiv 1706.03762, section 3.5). So how like two tokens
    are falls with their distance, and says nothing else.

    Args:
      patch: Pixels along a side of a token, as the teacher's.
      tubelet: Frames that a token covers, as the teacher's.
      channels: Of a token, a multiple of 6.
      longest: The longest wavelength is nearly so many times the shortest, 2 pi tokens. The shorter
        it is, the lower and the wider spread are the cosines of two tokens.
    """

    name: Literal["places"] = "places"
    weights: Literal["none"] = "none"
    # A piece would begin at the first place again.
    group: None = None
    crop: None = None
    patch: Side = 16
    tubelet: Frames = 2
    channels: Annotated[int, Field(ge=6, le=6000, multiple_of=6)] = 192
    longest: Annotated[float, Field(ge=1, le=1e6)] = 10_000.0

    def shape(self, clip_frames: int) -> TokenGrid:
        return self.patch_grid(Sizes(self.channels, self.patch, self.tubelet), clip_frames)

    def fingerprint(self) -> dict[str, str]:
        return {"encoder": json_digest(self.model_dump())}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        return PlaceEncoder(self, self.shape(self.frames).size).to(device, dtype)


class PlaceEncoder(Encoder):
    """Gives each token its place's channels, whatever the clip."""

    def __init__(self, spec: Places, size: tuple[int, int, int]) -> None:
        super().__init__(spec, spec.tubelet)
        pairs = spec.channels // 6
        rates = spec.longest ** -(torch.arange(pairs) / pairs)
        axes = [torch.arange(length)[:, None] * rates for length in size]
        waves = [torch.cat([angles.sin(), angles.cos()], 1) for angles in axes]
        steps, rows, columns = size
        placed = [
            waves[0][:, None, None].expand(-1, rows, columns, -1),
            waves[1][None, :, None].expand(steps, -1, columns, -1),
            waves[2][None, None].expand(steps, rows, -1, -1),
        ]
        self.places = nn.Parameter(torch.cat(placed, -1), requires_grad=False)

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        return self.places.expand(len(video), -1, -1, -1, -1)
