"""A straw man: any teacher's network with weights that have learnt nothing."""

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
    """A teacher with its weights drawn anew. What the teacher tells beyond this, it has learnt.

    Attributes:
        of: The teacher; its settings of size apply.
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
        # Drawn on the CPU, so that the weights are the same whatever the device.
        return UntrainedEncoder(self, self.of.load(torch.device("cpu"), dtype)).to(device)


class UntrainedEncoder(Encoder):
    """The teacher's network after its weights have been drawn anew."""

    def __init__(self, spec: Untrained, of: Encoder) -> None:
        super().__init__(spec, of.stride)
        self.of = of
        _draw_weights(of, spec.draw)

    @torch.no_grad()
    def forward(self, video: Float[Tensor, "b f 3 h w"]) -> TokenGrid:
        return self.of(video)


def _draw_weights(network: torch.nn.Module, seed: int) -> None:
    """Reset every layer as it resets itself. Shuffle parameters that belong to no such layer, for
    example tables of positions."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        for module in network.modules():
            reset = getattr(module, "reset_parameters", None)
            if callable(reset):
                reset()
                continue
            for parameter in module.parameters(recurse=False):
                order = torch.randperm(parameter.numel())
                parameter.copy_(parameter.flatten()[order].view_as(parameter))
