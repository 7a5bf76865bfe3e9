"""The pretended CUDA device follows CUDA's rules, and lies in a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.checkpoint import checkpoint

import fake_cuda as device


def dtypes_under_autocast(kind: str) -> dict[str, torch.dtype]:
    with FakeTensorMode(), torch.autocast(kind, torch.bfloat16):
        x = torch.empty(4, 8, device=kind, dtype=torch.bfloat16)
        norm = torch.nn.LayerNorm(8, device=kind, dtype=torch.bfloat16)
        linear = torch.nn.Linear(8, 8, device=kind)
        return {"norm": norm(x).dtype, "linear": linear(x.float()).dtype, "pow": x.pow(2).dtype}


def trained_with_checkpoints() -> tuple[str, str]:
    with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
        linear = torch.nn.Linear(8, 8, device="cuda")
        query = linear(torch.empty(1, 2, 6, 8, device="cuda"))
        attend = torch.nn.functional.scaled_dot_product_attention
        out = checkpoint(attend, query, query, query, use_reentrant=False)
        out.float().sum().backward()
        assert linear.weight.grad is not None
        return str(linear.weight.grad.device), out.grad_fn.name()


def on_two_devices() -> None:
    with FakeTensorMode():
        _ = torch.empty(2, device="cuda") + torch.empty(2)


def test_autocast_follows_the_device(fake_cuda) -> None:
    float32, bfloat16 = torch.float32, torch.bfloat16
    found = fake_cuda(dtypes_under_autocast, "cuda")
    assert found == {"norm": float32, "linear": bfloat16, "pow": float32}
    assert fake_cuda(dtypes_under_autocast, "cpu") == dict.fromkeys(found, bfloat16)


def test_passes_and_attention_run_as_on_a_gpu(fake_cuda) -> None:
    where, attention = fake_cuda(trained_with_checkpoints)
    assert where == "cuda:0"
    assert "FlashAttention" in attention


def test_a_tensor_on_the_wrong_device_is_an_error(fake_cuda) -> None:
    with pytest.raises(RuntimeError, match="at least two devices, cuda:0 and cpu"):
        fake_cuda(on_two_devices)


def test_this_process_has_no_such_device(fake_cuda) -> None:
    assert fake_cuda(os.getpid) != os.getpid()
    assert not torch.backends.cuda.is_built() and not torch.cuda.is_available()
    with pytest.raises(Exception, match="cuda"), FakeTensorMode():
        torch.nn.Linear(2, 2, device="cuda")(torch.empty(2, device="cuda")).sum().backward()
    assert fake_cuda(os.getenv, "LD_PRELOAD") is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("sys.platform", "darwin"), "on Linux alone"),
        (("torch.version.cuda", "12.6"), "of its own"),
        (("shutil.which", lambda name: None), r"no g\+\+"),
    ],
)
def test_what_is_in_the_way_of_pretending_is_named(monkeypatch, change, reason: str) -> None:
    monkeypatch.setattr(*change)
    assert reason.replace("\\", "") in (device.obstacle() or "")


def test_the_library_is_of_one_environment(fake_cuda, tmp_path: Path, monkeypatch) -> None:
    """It finds torch by its path, so another environment's, which may be gone, is not taken."""
    ours = device.built(tmp_path)
    (tmp_path / "torch").symlink_to(Path(torch.__file__).parent)
    monkeypatch.setattr(torch, "__file__", str(tmp_path / "torch" / "__init__.py"))
    assert device.built(tmp_path) != ours
