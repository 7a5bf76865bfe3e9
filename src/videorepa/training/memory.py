"""Makes a training take less memory, by the form of frozen weights and of the optimiser's moments.

On the meta device stand-ins replace quantised layers. They take as many bytes, at rest and at work,
so that `videorepa.training.cost` can run them without content.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from videorepa.backbones import Backbone
from videorepa.backbones._sampler import offload_layers
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.training.extras import extra_for
from videorepa.training.precision import kept_in_float32, limit_autocast
from videorepa.training.stand_ins import Held, cast_when_used


def frozen_form(recipe: Recipe, dtype: torch.dtype) -> str:
    """Name the format of the frozen weights of a training that computes in `dtype`."""
    if recipe.memory.frozen != "auto":
        return recipe.memory.frozen
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def load_transformer(
    recipe: Recipe, device: torch.device, dtype: torch.dtype, home: torch.device
) -> Backbone:
    """Load the transformer of the recipe's backbone, with frozen weights held as `memory.frozen`.

    It is loaded into main memory and goes home in the form in which it is held, part by part, so
    that the device never has to hold more.

    Args:
      recipe: Its `memory` says how frozen weights are held.
      device: Where the transformer runs. On the meta device nothing is read.
      dtype: To compute in.
      home: Where its weights wait until it runs.

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
    form = frozen_form(recipe, dtype)
    loaded_in = torch.float32 if form == "float32" else torch.bfloat16
    at_first = device if device.type == "meta" else torch.device("cpu")
    home = at_first if is_offloaded else home
    backbone = recipe.backbone.load(("transformer",), at_first, loaded_in)
    backbone.device = device
    if recipe.train.from_scratch and device.type != "meta":
        backbone.reinitialise(recipe.seed)
    transformer = backbone.transformer
    # A file stays mapped until all of its weights have been converted, so they are converted in the
    # order in which they lie there.
    kept = kept_in_float32(transformer)
    if memory.is_quantised:
        for number in range(recipe.backbone.shapes(recipe.data).blocks):
            _quantise(backbone.block(number + 1), form, dtype, kept, home)
            _cast(backbone.block(number + 1), dtype, kept)
        _cast(transformer, dtype, kept)
    elif form == "float8" or loaded_in == torch.bfloat16 != dtype:
        storage = torch.float8_e4m3fn if form == "float8" else loaded_in
        _hold_layerwise(transformer, storage, dtype, home)
    transformer.to(home)
    limit_autocast(transformer, dtype)
    if loaded_in == torch.bfloat16:
        backbone.dtype = dtype
    if is_offloaded:
        offload_layers(transformer, device)
    return backbone


def make_optimizer(recipe: Recipe, parameters: list[Tensor], device: torch.device) -> Optimizer:
    """Make AdamW over the parameters, with its moments in `memory.optimizer`.

    Args:
      recipe: Its `optim` and `memory` describe the optimiser.
      parameters: What is trained.
      device: Where the training runs. On CUDA, one kernel updates all parameters without temporary
        copies of them.

    Raises:
      UserError: bitsandbytes is needed and not installed.
    """
    optim = recipe.optim
    options: dict[str, Any] = {"betas": optim.betas, "eps": optim.eps}
    options |= {"weight_decay": optim.weight_decay}
    if recipe.memory.optimizer == "adamw8bit":
        kind = extra_for("memory.optimizer adamw8bit").AdamW8bit
        return kind(parameters, optim.learning_rate, **options)
    is_cuda = device.type == "cuda"
    return torch.optim.AdamW(parameters, optim.learning_rate, fused=is_cuda, **options)


def moment_bytes(recipe: Recipe, parameter: Tensor) -> int:
    """Count the bytes that the recipe's optimiser keeps for a parameter."""
    count = parameter.numel()
    # bitsandbytes leaves the moments of small tensors as they are.
    if recipe.memory.optimizer == "adamw" or count < 4096:
        return 2 * count * parameter.element_size()
    return 2 * (count + 4 * math.ceil(count / 256))


def update_bytes(recipe: Recipe, parameters: list[Tensor], device: torch.device) -> int:
    """Count the temporary bytes of an update.

    On a CPU, AdamW goes from parameter to parameter and takes two tensors of its size for each.
    """
    if recipe.memory.optimizer == "adamw8bit" or device.type == "cuda":
        return 0
    return 2 * max((parameter.nbytes for parameter in parameters), default=0)


def _quantise(
    block: nn.Module, frozen: str, dtype: torch.dtype, kept: frozenset[str], home: torch.device
) -> None:
    """Convert the weights of a block's linear layers to integers with scales, at home."""
    if next(block.parameters()).is_meta:
        _swap_linear(block, lambda linear: Held(linear, frozen, dtype))
    elif frozen == "int8":
        quantization = extra_for("memory.frozen int8")
        # torchao multiplies in the dtype that the weights have here.
        _cast(block.to(home), dtype, kept)
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
            layer.weight, layer.bias = weight.to(home), linear.bias
            return layer

        _swap_linear(block, packed)


def _swap_linear(module: nn.Module, make: Callable[[nn.Linear], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.Linear):
            setattr(module, name, make(child))
        else:
            _swap_linear(child, make)


def _cast(module: nn.Module, dtype: torch.dtype, kept: frozenset[str]) -> None:
    """Convert a module's floating-point tensors to the dtype to compute in, but those kept."""
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        is_kept = not kept.isdisjoint(name.split("."))
        if tensor.is_floating_point() and tensor.dtype != dtype and not is_kept:
            tensor.data = tensor.data.to(dtype)


def _hold_layerwise(
    transformer: Any, storage: torch.dtype, dtype: torch.dtype, home: torch.device
) -> None:
    """Hold layers at home in `storage`, and convert each to `dtype` when it runs.

    The few that diffusers leaves out (norms, embeddings, the last projection) become `dtype`.
    """
    # In the dtype of the files at first, so that hooking reads none of the weights.
    transformer.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=dtype)
    kept = kept_in_float32(transformer)
    for name, module in list(transformer.named_modules()):
        hooks = getattr(module, "_diffusers_hook", None)
        if hooks is not None:
            hooks.get_hook("layerwise_casting").storage_dtype = storage
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for part, tensor in own:
            if tensor.is_floating_point():
                held = dtype if hooks is None else storage
                if not kept.isdisjoint((*name.split("."), part)):
                    held = tensor.dtype
                # Copied even if the dtype stays, to leave the mapped file.
                tensor.data = tensor.data.to(held, copy=True).to(home)
        if hooks is not None and any(tensor.is_meta for _, tensor in own):
            cast_when_used(module, dtype)
