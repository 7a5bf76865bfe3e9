"""Keeps autocast away from layers that are better off without it."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

NORMS = (nn.LayerNorm, nn.RMSNorm)


def kept_in_float32(transformer: Any) -> frozenset[str]:
    """Name the modules and parameters that a stock class keeps in float32 in any precision."""
    return frozenset(transformer._keep_in_fp32_modules or ())


def limit_autocast(transformer: Any, dtype: torch.dtype) -> None:
    """Have layers run without autocast, where it would cost memory or precision.

    On CUDA, autocast runs norms in float32. The next layer converts the result back, after all that
    lies in between took twice the memory. Norms compute in float32 inside, so those whose weights
    have the dtype to compute in go without, as they do in stock pipelines. And modules that the
    stock class keeps in float32, such as Wan's time embedder, would be run in bfloat16.

    Args:
      transformer: A stock transformer, before layers are offloaded.
      dtype: To compute in.
    """
    if dtype == torch.float32:
        return
    kept = kept_in_float32(transformer)
    for name, module in transformer.named_modules():
        is_low = isinstance(module, NORMS) and _dtype(module, transformer) == dtype
        if is_low or name.rpartition(".")[2] in kept:
            layer: Any = module
            layer.__class__ = _without_autocast(type(module))


def convert_no_inputs(transformer: Any) -> None:
    """Keep peft from converting the inputs of adapters to float32, which autocast would undo."""
    adapted: list[Any] = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
    for layer in adapted:
        layer.cast_input_dtype_enabled = False


def _dtype(norm: nn.Module, transformer: Any) -> torch.dtype:
    weight = next(norm.parameters(recurse=False), None)
    return transformer.dtype if weight is None else weight.dtype


@cache
def _without_autocast(kind: type[nn.Module]) -> type[nn.Module]:
    """A class that does what another does, without autocast.

    A hook would do as well, but torch.compile would compile every block that has one anew.
    """

    def forward(self: nn.Module, input: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(input.device.type, enabled=False):
            return kind.forward(self, input, *arguments, **named)

    return type(kind.__name__, (kind,), {"forward": forward})
