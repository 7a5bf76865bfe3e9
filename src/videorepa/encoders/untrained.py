"""A straw man: any teacher's network with weights that have learnt nothing."""

from __future__ import annotations

from typing import Any, Literal

import torch
from jaxtyping import Float
from pydantic import SerializerFunctionWrapHandler, model_serializer, model_validator
from torch import Tensor

from videorepa.data.fingerprint import json_digest
from videorepa.encoders import FED, Encoder, EncoderSpec
from videorepa.recipe import EncoderField
from videorepa.tokens import TokenGrid


class Untrained(EncoderSpec):
    """The teacher `of` with weights drawn anew: what it tells beyond this, it has learnt.

    of: the teacher. How it is fed is said there alone. draw: another number gives other weights.
    """

    name: Literal["untrained"] = "untrained"
    weights: Literal["none"] = "none"
    of: EncoderField
    draw: int = 0

    @model_validator(mode="after")
    def _follows(self) -> Untrained:
        self.follow(self.of)
        return self

    @model_serializer(mode="wrap")
    def _own_keys(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        return {key: value for key, value in handler(self).items() if key not in FED}

    @property
    def relation_margin(self) -> float:
        return self.of.relation_margin

    @property
    def piece(self) -> tuple[int, int, int]:
        return self.of.piece

    def shape(self, clip_frames: int) -> TokenGrid:
        return self.of.shape(clip_frames)

    def fingerprint(self) -> dict[str, str]:
        return {"encoder": json_digest([self.of.fingerprint(), self.draw])}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        return UntrainedEncoder(self, self.of.load(torch.device("cpu"), dtype)).to(device)


class UntrainedEncoder(Encoder):
    """The live one."""

    def __init__(self, spec: Untrained, of: Encoder) -> None:
        super().__init__(spec, of.stride)
        self.of = of
        forget(of, spec.draw)

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return self.of(video)


def forget(encoder: torch.nn.Module, draw: int = 0) -> None:
    """Draw the weights anew, as the layers themselves do; parameters that belong to no such layer,
    such as position tables, are shuffled."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(draw)
        for module in encoder.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                order = torch.randperm(parameter.numel())
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
