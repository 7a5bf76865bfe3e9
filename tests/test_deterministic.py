"""A training that shall be deterministic takes no operator that is not, on a GPU too."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.system.device import deterministic
from videorepa.tokens import TokenGrid
from videorepa.train import train
from videorepa.training.cost import predict

REFUSED = {
    *("adaptive_avg_pool2d_backward", "avg_pool3d_backward", "bincount", "cumsum", "histc"),
    *("grid_sampler_2d_backward", "grid_sampler_3d_backward", "kthvalue", "max_pool3d_backward"),
    *("median", "nll_loss2d_forward", "reflection_pad1d_backward", "reflection_pad2d_backward"),
    *("replication_pad1d_backward", "replication_pad2d_backward", "replication_pad3d_backward"),
    *("upsample_bicubic2d_backward", "upsample_bilinear2d_backward", "upsample_linear1d_backward"),
    *("upsample_trilinear3d_backward",),
}
"""Operators that torch.use_deterministic_algorithms has no other kernel for on CUDA."""


class Called(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.removeprefix("_"))
        return func(*args, **(kwargs or {}))


def called_by_a_step(recipe: Recipe, is_wanted: bool) -> set[str]:
    with deterministic(is_wanted), Called() as called:
        predict(recipe, torch.device("cuda"), torch.device("cuda:0"))
    return called.names


def called_by_a_stretch() -> set[str]:
    with FakeTensorMode(), torch.device("cuda"):
        tokens = torch.empty(2, 3, 2, 2, 8, requires_grad=True)
        like = TokenGrid(torch.empty(2, 6, 2, 2, 8), 0, 2)
        with Called() as called, torch.autocast("cuda", torch.bfloat16):
            stretched = TokenGrid(tokens, 0, 4).at_times_of(like).tokens
            assert stretched.dtype == torch.float32
            stretched.sum().backward()
    return called.names


def test_a_stretch_in_time_is_a_matrix_product(fake_cuda) -> None:
    called = fake_cuda(called_by_a_stretch)
    assert "bmm" in called and "index_add" not in called


@pytest.mark.parametrize("projector", ["mlp", "conv"])
def test_a_step_takes_no_operator_that_a_gpu_would_refuse(
    recipe: Recipe, fake_cuda, projector: str
) -> None:
    size = "encoder.height=32", "encoder.width=32"  # Frames are interpolated.
    recipe = recipe.override("train.precision=auto", f"align.projector={projector}", *size)
    assert fake_cuda(called_by_a_step, recipe, is_wanted=False) & REFUSED
    assert not fake_cuda(called_by_a_step, recipe, is_wanted=True) & REFUSED


def test_what_was_set_is_set_back(monkeypatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory


def test_a_cpu_gives_the_same_bits_anyway(recipe: Recipe, tmp_path: Path, monkeypatch) -> None:
    prepare(recipe)
    plain = recipe.override("optim.steps=2")
    usual = train(plain, tmp_path / "usual")
    forced: list[bool] = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self: (forced.append(torch.are_deterministic_algorithms_enabled()), step(self)),
    )
    exact = train(plain.override("train.deterministic=true"), tmp_path / "exact")
    assert forced == [True, True]
    for key, value in usual.trained().trained.items():
        assert torch.equal(value, exact.trained().trained[key]), key
