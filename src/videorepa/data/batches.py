"""A training batch, and how it is made ahead of its use and comes to a GPU beside its work."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from itertools import repeat
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.backbones import Text
from videorepa.conditioning import Opening
from videorepa.encoders import EncoderSpec
from videorepa.system import background
from videorepa.tokens import TokenGrid


@dataclass(frozen=True)
class Batch:
    """All that one micro-batch needs.

    Attributes:
      latents: Clean latents at the transformer's scale.
      text: The captions' tensors; a dropped caption's are the empty caption's.
      noise: Standard normal.
      timestep: One for each clip.
      teachers: The clips' features by encoder.
      opening: What the model is shown of the clips; None where it works from text alone.
    """

    latents: Float[Tensor, "b f c h w"]
    text: Text
    noise: Float[Tensor, "b f c h w"]
    timestep: Num[Tensor, " b"]
    teachers: dict[EncoderSpec, TokenGrid]
    opening: Opening | None = None

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Batch:
        """A batch of what `change` makes of each tensor."""
        return Batch(
            change(self.latents),
            {name: change(value) for name, value in self.text.items()},
            change(self.noise),
            change(self.timestep),
            {encoder: grid.mapped(change) for encoder, grid in self.teachers.items()},
            self.opening and self.opening.mapped(change),
        )

    def to(self, device: torch.device) -> Batch:
        """The batch on a device, with features in float32.

        A GPU copies it from pinned memory, and nobody waits for that.
        """

        def sent(tensor: Tensor) -> Tensor:
            if device.type == "cuda" and tensor.device.type == "cpu":
                return tensor.pin_memory().to(device, non_blocking=True)
            return tensor.to(device)

        batch = self.mapped(sent)
        grids = {encoder: grid.to(device) for encoder, grid in batch.teachers.items()}
        return replace(batch, teachers=grids)


def ahead(batches: Iterator[Batch], device: torch.device) -> Generator[Batch]:
    """Give the batches of an iterator, whose next one a thread makes meanwhile.

    On a GPU it makes them on a stream of its own, so that its copies and its online teachers run
    beside the training's kernels. The stream that takes a batch waits for that stream, and the
    processor for neither. A caller that stops early waits a few seconds at most for the batch that
    has begun, such as one whose file cannot be read for now.

    Args:
      batches: Makes the batches.
      device: Where they are.
    """
    stream: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    def make(_: None) -> tuple[Batch | None, Any]:
        with nullcontext() if stream is None else torch.cuda.stream(stream):
            batch = next(batches, None)
            return batch, None if stream is None else stream.record_event()

    def taken(tensor: Tensor) -> Tensor:
        if tensor.device.type == device.type:
            # Its memory is not given to the other stream's next batch while it is in use here.
            tensor.record_stream(torch.cuda.current_stream(device))
        return tensor

    with closing(background.ahead(make, repeat(None), threads=1, most=2)) as coming:
        for batch, event in coming:
            if batch is None:
                return
            if event is not None:
                torch.cuda.current_stream(device).wait_event(event)
                batch.mapped(taken)
            yield batch
