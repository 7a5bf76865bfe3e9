"""Keeps autocast away from layers that are better off without it."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.hooks import HookRegistry, ModelHook
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
    have the dtype to compute in go without, as they do in stock pipelines. Modules that the stock
    class keeps in float32, such as Wan's time embedder, would be run in bfloat16. And peft converts
    the inputs of adapters to float32, which autocast undoes.

    Args:
      transformer: A stock transformer, with its adapters if there are any.
      dtype: To compute in.
    """
    if dtype == torch.float32:
        return
    kept = kept_in_float32(transformer)
    adapted: list[Any] = [m for m in transformer.modules() if isinstance(m, BaseTunerLayer)]
    for layer in adapted:
        layer.cast_input_dtype_enabled = False
    for name, module in transformer.named_modules():
        is_low = isinstance(module, NORMS) and _dtype(module, transformer) == dtype
        if is_low or name.rpartition(".")[2] in kept:
            registry = HookRegistry.check_if_exists_or_initialize(module)
            registry.register_hook(_WithoutAutocast(), "without_autocast")


def _dtype(norm: nn.Module, transformer: Any) -> torch.dtype:
    weight = next(norm.parameters(recurse=False), None)
    return transformer.dtype if weight is None else weight.dtype


class _WithoutAutocast(ModelHook):
    def new_forward(self, module: nn.Module, input: Tensor, *arguments: Any, **named: Any) -> Any:
        with torch.autocast(input.device.type, enabled=False):
            run: Any = self.fn_ref.original_forward
            return run(input, *arguments, **named)
