"""Keeps the output of a block while the model runs, without changing the block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class Tapped:
    """Holds what a block gave in the latest forward pass."""

    def __init__(self) -> None:
        self._output: Any = None

    def take(self) -> Any:
        """The block's output, once. Raises RuntimeError if the block has not run since."""
        if self._output is None:
            raise RuntimeError("The tapped block has not run since its output was last taken.")
        output, self._output = self._output, None
        return output


@contextmanager
def tap(block: nn.Module) -> Iterator[Tapped]:
    """Keep the output of `block`, gradient and all, for as long as the context lasts.

    A forward hook on the unmodified module; of several passes the latest counts. Activation
    checkpointing runs the block once more during the backward pass; that output has no part in the
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
