"""Image teachers: frames are encoded one by one, and their tokens may be averaged over time."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.encoders._vit import ViT, ViTSpec
from videorepa.errors import UserError
from videorepa.settings.bounds import Frames
from videorepa.tokens import TokenGrid

IMAGES_AT_ONCE = 8
"""Frames in memory at a time: 49 frames of 420 x 630 pixels have 66,150 tokens."""


class ImageViT(ViT):
    """A live image teacher, whose model gives the patches' tokens last, after its class token."""

    def __init__(self, spec: ImageSpec, model: Any) -> None:
        super().__init__(spec, model)
        self.pool = spec.pool

    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return super().forward(video).pooled(self.pool)

    def features(self, video: Float[Tensor, "b f 3 h w"]) -> Float[Tensor, "b t h w d"]:
        _, rows, columns = self.size
        tokens = [
            self.model(images).last_hidden_state[:, -rows * columns :]
            for images in video.flatten(0, 1).split(IMAGES_AT_ONCE)
        ]
        return torch.cat(tokens).unflatten(1, (rows, columns)).unflatten(0, video.shape[:2])


class ImageSpec(ViTSpec):
    """An image model, which sees every frame by itself.

    Args:
      pool: Frames that are averaged into a step; a first frame that is left over keeps a step of
        its own. VideoREPA's REPA baseline has 49 frames and pool 4: CogVideoX's 13 steps.
    """

    live: ClassVar = ImageViT
    kernel: ClassVar[int] = 2

    pool: Frames = 1

    @property
    def piece(self) -> tuple[int, int, int]:
        if self.group is not None:
            raise UserError(
                f"The encoder {self.name} sees every frame by itself: leave out encoder.group."
            )
        return super().piece

    def shape(self, clip_frames: int) -> TokenGrid:
        return super().shape(clip_frames).pooled(self.pool)
