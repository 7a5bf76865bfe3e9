"""Keeps a block's output while the model runs, without changing the block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Tapped:
    """Holds a block's output of the latest forward pass."""

    def __init__(self) -> None:
        self._output: Any = None

    def take(self) -> Any:
        """Give the block's output, and release it.

        Raises:
          RuntimeError: The block has not run since the last call.
        """
        if self._output is None:
            raise RuntimeError("The tapped block has not run since its output was last taken.")
        output, self._output = self._output, None
        return output


@contextmanager
def tap(block: nn.Module) -> Iterator[Tapped]:
    """Keep the output of `block`, with its graph, for as long as the context lasts.

    This is a forward hook on the unmodified module; the latest pass counts. Activation
    checkpointing runs the block again during the backward pass. That output has no part in the
    loss and is not kept.
    """
    tapped = Tapped()

    def keep(module: nn.Module, args: Any, output: Any) -> None:
        if not in_backward():
            tapped._output = output

    handle = block.register_forward_hook(keep)
    try:
        yield tapped
    finally:
        handle.remove()


def in_backward() -> bool:
    """Whether a backward pass is running, in which activation checkpointing runs blocks again."""
    return torch._C._current_graph_task_id() != -1
