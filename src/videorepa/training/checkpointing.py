"""Checkpoints activations: blocks keep their inputs, perhaps in main memory, and nothing else."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint

from videorepa.backbones import Backbone
from videorepa.errors import UserError
from videorepa.settings.sections import Memory
from videorepa.training.stand_ins import save_nowhere


def checkpoint_blocks(backbone: Backbone, memory: Memory, device: torch.device) -> None:
    """Let the transformer compute blocks once more in the backward pass, as `memory` says.

    Args:
      backbone: Its transformer has been loaded.
      memory: Says which blocks, and where their inputs wait for the backward pass.
      device: Where the transformer runs. On the meta device inputs that would wait in main memory
        take no bytes.

    Raises:
      UserError: Inputs should wait in main memory, and are there already.
    """
    if memory.offload_activations and device.type == "cpu":
        raise UserError(
            "memory.offload_activations is true, and the training is on the CPU, where there is "
            "nowhere else to keep them. Set it to false."
        )
    blocks = enumerate(backbone.blocks(), start=1)
    whole = {block for number, block in blocks if not memory.checkpoints(number)}

    def keeping() -> AbstractContextManager[Any]:
        if not memory.offload_activations:
            return nullcontext()
        return save_nowhere() if device.type == "meta" else save_on_cpu(pin_memory=True)

    def run(block: nn.Module, *arguments: Any) -> Any:
        if block in whole:
            return block(*arguments)
        with keeping():
            return checkpoint(block.__call__, *arguments, use_reentrant=False)

    backbone.transformer.enable_gradient_checkpointing(run)
