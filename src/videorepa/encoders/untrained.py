"""A straw man: any teacher's network with random weights."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from videorepa.encoders import Encoder
from videorepa.encoders._wrapper import WrapperSpec
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid


class Untrained(WrapperSpec):
    """A teacher with weights drawn anew: whatever the trained one knows beyond this, it learnt.

    Args:
      of: The teacher. How it is fed is set there alone.
      draw: Seed of the weights.
    """

    name: Literal["untrained"] = "untrained"
    weights: Literal["none"] = "none"
    draw: int = 0

    def shape(self, clip_frames: int) -> TokenGrid:
        return self.of.shape(clip_frames)

    def fingerprint(self) -> dict[str, str]:
        return {"encoder": json_digest([self.of.fingerprint(), self.draw])}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        return UntrainedEncoder(self, self.of.load(torch.device("cpu"), dtype)).to(device)


class UntrainedEncoder(Encoder):
    """A live encoder whose weights are forgotten when it is made."""

    def __init__(self, spec: Untrained, of: Encoder) -> None:
        super().__init__(spec, of.stride)
        self.of = of
        forget(of, spec.draw)

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return self.of(video)


def forget(encoder: torch.nn.Module, draw: int = 0) -> None:
    """Draw the weights of all layers anew, by the layers' own initialisation.

    Parameters outside such layers, for instance position tables, are shuffled.

    Args:
      encoder: Changed in place.
      draw: Seed of the weights.
    """
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
