"""Teachers: frozen video encoders, each adapted in one file to give a token grid."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from videorepa.errors import UserError
from videorepa.settings import plugins
from videorepa.settings.section import Section
from videorepa.tokens import TokenGrid

IMAGENET_MEAN = (0.485, 0.456, 0.406)

IMAGENET_STD = (0.229, 0.224, 0.225)

Pixels = Annotated[int, Field(ge=1)]


class EncoderSpec(Section):
    """What a recipe holds of an encoder: cheap to make, loads nothing.

    weights: a checkpoint in a published layout, a transformers folder, a Hub id, or "micro".
    frames: how many frames it sees, the last ones of the clip it is given.
    height, width: what each frame is resized to, in pixels.
    normalized: the video has mean and deviation taken out already.

    A teacher made for small, short clips can be fed a large one in three ways (VideoREPA's
    ablation): whole, at a small size, as VideoREPA does; or at its full size cut into pieces, each
    encoded by itself and the tokens put together again:
    group: how many frames make a piece; by default all.
    crop: height and width of a piece in pixels; by default the whole frame.
    """

    name: str
    weights: str
    frames: int = Field(default=48, ge=1)
    height: int = Field(default=160, ge=1)
    width: int = Field(default=240, ge=1)
    normalized: bool = False
    group: int | None = Field(default=None, ge=1)
    crop: tuple[Pixels, Pixels] | None = None

    @property
    def relation_margin(self) -> float:
        """The margin of a relation loss that suits this teacher. Where nobody has published one,
        it is the published code's default."""
        return 0.1

    @property
    def piece(self) -> tuple[int, int, int]:
        """Frames, height and width of what is encoded at once.

        Raises UserError unless the clip divides into such pieces.
        """
        crop = self.crop or (self.height, self.width)
        piece = (self.group or self.frames, *crop)
        whole = (self.frames, self.height, self.width)
        for key, own, part in zip(("frames", "height", "width"), whole, piece, strict=True):
            if own % part:
                cut = "group" if key == "frames" else "crop"
                raise UserError(
                    f"encoder.{key} is {own}, which is no multiple of {part} as encoder.{cut} "
                    "wants: pieces must fill the clip. Change one of the two."
                )
        return piece

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
    grid's start says so. Resizing is bicubic without antialias, as published. Pieces are cut after
    resizing.
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
        return TokenGrid(self._in_pieces(video.to(parameter.dtype)), start, self.stride)

    def _in_pieces(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        frames, height, width = self.spec.piece
        groups = []
        for group in video.split(frames, 1):
            rows = []
            for row in group.split(height, -2):
                pieces = [self.features(piece) for piece in row.split(width, -1)]
                rows.append(torch.cat(pieces, 3))
            groups.append(torch.cat(rows, 2))
        return torch.cat(groups, 1)

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        """Tokens of one piece of a clip (`EncoderSpec.piece`; by default the whole), normalised."""
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
