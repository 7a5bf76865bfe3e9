"""Autocast leaves alone what it would slow down or make less precise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import twins
from videorepa.backbones import BackboneSpec
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize, Lora
from videorepa.system.device import autocast
from videorepa.training.memory import _hold_layerwise
from videorepa.training.precision import convert_no_inputs, limit_autocast

BFLOAT16 = torch.bfloat16
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def wan(tmp_path_factory: pytest.TempPathFactory) -> BackboneSpec:
    folder = twins.wan(tmp_path_factory.mktemp("wan") / "twin")
    return plugins.description("backbones", "wan")(weights=str(folder))


class Widened(TorchDispatchMode):
    """Counts the conversions of whole activations to float32."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.count = size, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and args[0].dtype == BFLOAT16:
            self.count += result.dtype == torch.float32 and result.numel() >= self.size
        return result


def run(transformer: Any, spec: BackboneSpec) -> None:
    shapes = spec.shapes(ClipSize(frames=5, height=32, width=32))
    text = {name: torch.randn(1, *one.shape).to(BFLOAT16) for name, one in shapes.text.items()}
    frames, channels, height, width = shapes.latents
    with autocast(CPU, BFLOAT16):
        transformer(
            hidden_states=torch.randn(1, channels, frames, height, width).to(BFLOAT16),
            timestep=torch.tensor([500]),
            **text,
        )


@pytest.mark.parametrize("frozen", [torch.float32, BFLOAT16, torch.float8_e4m3fn])
def test_wans_time_embedder_runs_in_float32(wan: BackboneSpec, frozen: torch.dtype) -> None:
    loaded_in = torch.float32 if frozen == torch.float32 else BFLOAT16
    transformer = wan.load(("transformer",), CPU, loaded_in).transformer
    if frozen == torch.float8_e4m3fn:
        _hold_layerwise(transformer, frozen, BFLOAT16, CPU)
    limit_autocast(transformer, BFLOAT16)
    seen: dict[str, torch.dtype] = {}
    embedder = transformer.condition_embedder
    for name in ("time_embedder.linear_1", "time_embedder.linear_2", "time_proj"):
        layer = embedder.get_submodule(name)
        layer.register_forward_hook(lambda *a, name=name: seen.update({name: a[-1].dtype}))
    run(transformer, wan)
    expected = {"time_embedder.linear_1": torch.float32, "time_embedder.linear_2": torch.float32}
    assert seen == expected | {"time_proj": BFLOAT16}
    assert transformer.blocks[0].scale_shift_table.dtype == torch.float32


def test_adapters_convert_no_inputs(wan: BackboneSpec) -> None:
    transformer = wan.load(("transformer",), CPU, BFLOAT16).transformer
    wan.add_lora(transformer, Lora(rank=2, alpha=2))
    for parameter in transformer.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    inputs = 2 * 2 * 2 * 24  # Tokens x width.

    def widened() -> int:
        with Widened(inputs) as counted:
            run(transformer, wan)
        return counted.count

    before = widened()
    convert_no_inputs(transformer)
    # q, k, v and the output's projection, in the self-attention of three blocks and, where the
    # text is shorter or longer, at least q and the output's in the other attention.
    assert before - widened() >= 3 * (4 + 2)


def dtypes_of_norms(held: torch.dtype) -> list[torch.dtype]:
    from diffusers import CogVideoXTransformer3DModel
    from torch._subclasses import FakeTensorMode

    sizes = {"num_attention_heads": 2, "attention_head_dim": 16, "num_layers": 1}
    with FakeTensorMode(), torch.device("cuda"):
        torch.set_default_dtype(held)
        transformer = CogVideoXTransformer3DModel(**sizes)
        torch.set_default_dtype(torch.float32)
        limit_autocast(transformer, BFLOAT16)
        norms = [part for part in transformer.modules() if isinstance(part, nn.LayerNorm)]
        with autocast(torch.device("cuda"), BFLOAT16):
            return [
                norm(torch.empty(2, norm.normalized_shape[0], dtype=BFLOAT16)).dtype
                for norm in norms
            ]


def test_norms_in_the_compute_dtype_stay_in_it_on_a_gpu(fake_cuda) -> None:
    assert set(fake_cuda(dtypes_of_norms, BFLOAT16)) == {BFLOAT16}
    assert set(fake_cuda(dtypes_of_norms, torch.float32)) == {torch.float32}


def test_nothing_is_changed_where_nothing_is_cast(wan: BackboneSpec, tmp_path: Path) -> None:
    transformer = wan.load(("transformer",), CPU).transformer
    limit_autocast(transformer, torch.float32)
    untouched = wan.load(("transformer",), CPU).transformer
    kinds = [[type(part) for part in model.modules()] for model in (transformer, untouched)]
    assert kinds[0] == kinds[1]
