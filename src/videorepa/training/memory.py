"""Makes a training take less memory, by the form of frozen weights and of the optimiser's moments.

On the meta device stand-ins replace quantised layers. They take as many bytes, at rest and at work,
so that `videorepa.training.cost` can run them without content.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from videorepa.backbones import Backbone
from videorepa.backbones._sampler import offload_layers
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.training.extras import extra_for
from videorepa.training.stand_ins import Held, cast_when_used


def load_transformer(recipe: Recipe, device: torch.device, dtype: torch.dtype) -> Backbone:
    """Load the transformer of the recipe's backbone, with frozen weights held as `memory.frozen`.

    Args:
      recipe: Its `memory` says how frozen weights are held.
      device: Where the transformer runs. On the meta device nothing is read.
      dtype: To compute in.

    Raises:
      UserError: A package that the recipe needs is not installed, or the device cannot offload.
    """
    memory = recipe.memory
    is_offloaded = memory.offload == "group" and device.type != "meta"
    if is_offloaded and device.type == "cpu":
        raise UserError(
            "memory.offload is group, and the training is on the CPU, where there is nowhere else "
            "to keep weights. Set it to none."
        )
    loaded_in = torch.float32 if memory.frozen == "float32" else torch.bfloat16
    home = torch.device("cpu") if is_offloaded else device
    backbone = recipe.backbone.load(("transformer",), home, loaded_in)
    backbone.device = device
    transformer = backbone.transformer
    # A file stays mapped until all of its weights have been converted, so they are converted in the
    # order in which they lie there.
    if memory.is_quantised:
        for number in range(recipe.backbone.shapes(recipe.data).blocks):
            _quantise(backbone.block(number + 1), memory.frozen, dtype)
            _cast(backbone.block(number + 1), dtype)
        _cast(transformer, dtype)
    elif memory.frozen == "float8" or loaded_in == torch.bfloat16 != dtype:
        storage = torch.float8_e4m3fn if memory.frozen == "float8" else loaded_in
        _hold_layerwise(transformer, storage, dtype)
    if loaded_in == torch.bfloat16:
        backbone.dtype = dtype
    if is_offloaded:
        offload_layers(transformer, device)
    return backbone


def make_optimizer(recipe: Recipe, parameters: list[Tensor]) -> Optimizer:
    """Make AdamW over the parameters, with its moments in `memory.optimizer`.

    Raises:
      UserError: bitsandbytes is needed and not installed.
    """
    optim = recipe.optim
    kind = torch.optim.AdamW
    if recipe.memory.optimizer == "adamw8bit":
        kind = extra_for("memory.optimizer adamw8bit").AdamW8bit
    return kind(
        parameters,
        optim.learning_rate,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
    )


def moment_bytes(recipe: Recipe, parameter: Tensor) -> int:
    """Count the bytes that the recipe's optimiser keeps for a parameter."""
    count = parameter.numel()
    # bitsandbytes leaves the moments of small tensors as they are.
    if recipe.memory.optimizer == "adamw" or count < 4096:
        return 2 * count * parameter.element_size()
    return 2 * (count + 4 * math.ceil(count / 256))


def _quantise(block: nn.Module, frozen: str, dtype: torch.dtype) -> None:
    """Convert the weights of a block's linear layers to integers with scales."""
    if next(block.parameters()).is_meta:
        _swap_linear(block, lambda linear: Held(linear, frozen))
    elif frozen == "int8":
        quantization = extra_for("memory.frozen int8")
        # torchao multiplies in the dtype that the weights have here.
        block.to(dtype)
        quantization.quantize_(block, quantization.Int8WeightOnlyConfig())
    else:
        layers = extra_for("memory.frozen nf4")

        def packed(linear: nn.Linear) -> nn.Module:
            layer = layers.Linear4bit(
                linear.in_features, linear.out_features, compute_dtype=dtype, device="meta"
            )
            weight = layers.Params4bit(
                linear.weight.data, requires_grad=False, quant_type="nf4", module=layer
            )
            layer.weight, layer.bias = weight.to(linear.weight.device), linear.bias
            return layer

        _swap_linear(block, packed)


def _swap_linear(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            _swap_linear(child, make)


def _cast(module: nn.Module, dtype: torch.dtype) -> None:
    """Convert a module's floating-point tensors to the dtype to compute in."""
    for part in module.modules():
        if not isinstance(part, Held):
            for tensor in _own(part):
                if tensor.is_floating_point() and tensor.dtype != dtype:
                    tensor.data = tensor.data.to(dtype)


def _hold_layerwise(transformer: Any, storage: torch.dtype, dtype: torch.dtype) -> None:
    """Hold layers in `storage`, and convert each to `dtype` when it runs.

    The few that diffusers leaves out (norms, embeddings, the last projection) become `dtype`.
    """
    # In the dtype of the files at first, so that hooking reads none of the weights.
    transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=dtype)
    for module in list(transformer.modules()):
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None:
            hooks.get_hook("layerwise_casting").storage_dtype = storage
        for tensor in _own(module):
            if tensor.is_floating_point():
                # Copied even if the dtype stays, to leave the mapped file.
                tensor.data = tensor.data.to(dtype if hooks is None else storage, copy=True)
        if hooks is not None and any(tensor.is_meta for tensor in _own(module)):
            cast_when_used(module, dtype)


def _own(module: nn.Module) -> tuple[Tensor, ...]:
    return *module.parameters(recurse=False), *module.buffers(recurse=False)
