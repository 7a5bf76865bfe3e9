"""A straw man: any teacher's network with weights that have learnt nothing."""

from __future__ import annotations

from typing import Literal

import torch

from videorepa.encoders import Encoder
from videorepa.encoders._wrapper import WrapperSpec
from videorepa.settings.bounds import Seed
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid


class Untrained(WrapperSpec):
    """A teacher with its weights drawn anew. What the teacher's features add, it has learnt.

    Args:
      of: The teacher. Its frames, sizes and pieces are set there alone.
      draw: Seed of the weights.
    """

    name: Literal["untrained"] = "untrained"
    weights: Literal["none"] = "none"
    draw: Seed = 0

    def shape(self, clip_frames: int) -> TokenGrid:
        return self.of.shape(clip_frames)

    def fingerprint(self) -> dict[str, str]:
        return {"encoder": json_digest([self.of.fingerprint(), self.draw])}

    def load(self, device: torch.device, dtype: torch.dtype = torch.float32) -> Encoder:
        # Drawn on the CPU, so that the weights are the same whatever the device.
        encoder = self.of.load(torch.device("cpu"), dtype)
        _draw_weights(encoder, self.draw)
        return encoder.to(device)


def _draw_weights(network: torch.nn.Module, seed: int) -> None:
    """Let every layer reset its own parameters, and shuffle those that no layer resets.

    Position tables are such parameters.
    """
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
