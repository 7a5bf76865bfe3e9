"""Teachers: frozen video encoders, each adapted in one file to give a token grid."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from videorepa import plugins
from videorepa.errors import UserError
from videorepa.recipe import Section
from videorepa.tokens import TokenGrid

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class EncoderSpec(Section):
    """What a recipe holds of an encoder: cheap to make, loads nothing.

    weights: a checkpoint in a published layout, a transformers folder, a Hub id, or "micro".
    frames: how many frames it sees, the last ones of the clip it is given.
    height, width: what each frame is resized to, in pixels.
    normalized: the video has mean and deviation taken out already.
    """

    name: str
    weights: str
    frames: int = Field(default=48, ge=1)
    height: int = Field(default=160, ge=1)
    width: int = Field(default=240, ge=1)
    normalized: bool = False

    @property
    def relation_margin(self) -> float:
        """The margin that the relation loss was published with for this encoder."""
        return 0.1

    def shape(self, clip_frames: int) -> TokenGrid:
        """The grid for a clip of that many frames, without its tokens (on the meta device)."""
        raise NotImplementedError

    def fingerprint(self) -> dict[str, str]:
        """What stored features depend on."""
        raise NotImplementedError

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        """The live encoder."""
        raise NotImplementedError

    def first_frame(self, clip_frames: int) -> int:
        """The first frame that the encoder sees. Raises UserError if the clip is too short."""
        if clip_frames < self.frames:
            raise UserError(
                f"The encoder {self.name} wants {self.frames} frames and the clip has "
                f"{clip_frames}. Lower encoder.frames or give longer clips."
            )
        return clip_frames - self.frames


class Encoder(nn.Module):
    """A frozen encoder: video (B, F, 3, H, W) in [0, 1] to a grid of tokens.

    Of a longer clip it sees the last `frames` frames, as VideoREPA's teacher sees 48 of 49: the
    grid's start says so. Resizing is bicubic without antialias, as published.
    """

    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __init__(self, spec: EncoderSpec, stride: int) -> None:
        super().__init__()
        self.spec, self.stride = spec, stride

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        spec = self.spec
        start = spec.first_frame(video.shape[1])
        parameter = next(self.parameters())
        video = video[:, start:].to(parameter.device, torch.float32)
        size = (spec.height, spec.width)
        if video.shape[-2:] != size:
            resized = F.interpolate(video.flatten(0, 1), size, mode="bicubic", align_corners=False)
            video = resized.unflatten(0, video.shape[:2])
        if not spec.normalized:
            mean = video.new_tensor(self.mean).view(3, 1, 1)
            std = video.new_tensor(self.std).view(3, 1, 1)
            video = (video - mean) / std
        return TokenGrid(self.features(video.to(parameter.dtype)), start, self.stride)

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        """Tokens of a clip that has the right size and is normalised, before any final norm."""
        raise NotImplementedError


def load_encoder(
    name: str,
    weights: str | Path,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Encoder:
    """The encoder of that name with weights of any layout it knows; sizes are read from them.

    options: `frames`, `height`, `width`, `normalized` and the encoder's own, as in a recipe.
    Raises UserError for weights that are missing, another model's, or a pickle with code in it.
    """
    spec = plugins.description("encoders", name)(name=name, weights=str(weights), **options)
    return spec.load(torch.device(device), dtype)
