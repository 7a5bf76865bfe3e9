"""Stands in, without content, for what holds weights and activations in less memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.utils.parametrize import register_parametrization


def cast_when_used(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast a module's weights by a parametrisation in place of diffusers' hook.

    The hook swaps the content of parameters, which fails on tensors without content.
    """
    del module.forward  # pyright: ignore[reportAttributeAccessIssue]
    for name in [name for name, _ in module.named_parameters(recurse=False)]:
        register_parametrization(module, name, _Cast(dtype), unsafe=True)


class _Cast(nn.Module):
    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def forward(self, held: Tensor) -> Tensor:
        return held.to(self.dtype)


def save_nowhere() -> saved_tensors_hooks:
    """Let tensors that are kept for the backward pass take no bytes until then.

    It stands for torch's `save_on_cpu`, where only another device's memory counts.
    """
    return saved_tensors_hooks(
        lambda tensor: (tensor.device, tensor.to("meta")),
        lambda kept: torch.empty_like(kept[1], device=kept[0]),
    )


class Held(nn.Linear):
    """A stand-in for a layer whose weight is held as integers with scales.

    It takes as many bytes, and its backward pass keeps the same tensors.

    Args:
      linear: The layer to stand for, on the meta device.
      frozen: "int8" or "nf4".
      dtype: To compute in.
    """

    def __init__(self, linear: nn.Linear, frozen: str, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        self.dtype = dtype
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.frozen = linear.weight, linear.bias, frozen
        count = linear.weight.numel()
        # Scales are float32: one for each row (int8) or for each 64 weights (nf4).
        size = count + 4 * self.out_features if frozen == "int8" else count // 2 + count // 16
        packed = torch.empty(size, dtype=torch.uint8, device="meta")
        self.weight = nn.Parameter(packed, requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        if self.frozen == "nf4":
            x = input.to(self.dtype)
            output = _UnpackedTwice.apply(x, self.weight, self.bias, self.out_features)
            return output.to(input.dtype)  # As bitsandbytes does.
        weight = input.new_empty(self.out_features, self.in_features)
        bias = None if self.bias is None else self.bias.to(input.dtype)
        return nn.functional.linear(input, weight, bias)


class _UnpackedTwice(torch.autograd.Function):
    """Unpacks the weight in the forward and again in the backward pass, as bitsandbytes does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, held: Tensor, bias: Tensor | None, rows: int) -> Tensor:
        ctx.rows, ctx.columns = rows, x.shape[-1]
        return nn.functional.linear(x, x.new_empty(rows, x.shape[-1]), bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor):
        return gradient @ gradient.new_empty(ctx.rows, ctx.columns), None, None, None
