"""The device to run on, the precision that is fast there, and the memory in use there."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import psutil
import torch

from videorepa.errors import UserError
from videorepa.system.wording import shown

Precision = Literal["auto", "float32"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Parameters of glibc's mallopt."""


PEAK_TFLOPS = {
    "NVIDIA A100-PCIE-40GB": 312,
    "NVIDIA A100 80GB PCIe": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA H100 NVL": 835,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H200": 989,
    "NVIDIA B200": 2250,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 3090": 71,
    "NVIDIA GeForce RTX 4090": 165,
}
"""10^12 dense operations a second in bfloat16 with float32 sums, by the name that CUDA gives.

From NVIDIA's data sheets, which often state twice as many, for sparse matrices; those of GeForce
from the whitepapers on GA102 and Ada.
"""


def pick_device(name: str | None = None) -> torch.device:
    """Give the named device; without a name the first GPU, or else the CPU.

    Raises:
      UserError: There is no such kind of device. Whether this machine has it is not asked.
    """
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not re.fullmatch(r"(cuda|mps|xpu)(:\d{1,3})?|cpu", name):
        raise UserError(
            f"There is no device {shown(name)}; expected cpu, cuda, or a GPU's number as in cuda:1."
        )
    return torch.device(name)


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16.

    A CPU that does not emulates it, over a hundred times slower than float32.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Choose bfloat16 to compute in, or float32 if it is asked for or bfloat16 would be slow."""
    if precision == "float32" or not has_fast_bfloat16(device):
        return torch.float32
    return torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Run matrix products and convolutions in `dtype`; float32 changes nothing.

    Autocast's cache would keep a copy of every weight in `dtype` until the end of a forward pass.
    """
    is_enabled = dtype != torch.float32
    return torch.autocast(device.type, dtype, enabled=is_enabled, cache_enabled=False)


def peak_rate(device: torch.device, dtype: torch.dtype) -> float | None:
    """Give the device's peak rate in operations a second by its maker; None if it is not listed."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    peak = PEAK_TFLOPS.get(torch.cuda.get_device_name(device))
    return None if peak is None else peak * 1e12


@contextmanager
def deterministic(is_wanted: bool) -> Iterator[None]:
    """Take kernels that give the same bits each time, while the context is open.

    On CUDA they are slower. Call it before the first operation there: cuBLAS reads once how much
    memory it may use.

    Args:
      is_wanted: Whether anything is changed at all.
    """
    if not is_wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    fills: Any = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), fills.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    fills.fill_uninitialized_memory = False  # It would only show faults, at a price.
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        fills.fill_uninitialized_memory = before[1]


def peak_memory(device: torch.device) -> int:
    """Measure the most bytes so far, of tensors on the GPU or of this process in main memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows has no such module. There, and only there, psutil has the peak.
        memory: Any = psutil.Process().memory_info()
        return memory.peak_wset
    unit = 1 if sys.platform == "darwin" else 1024
    return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def release(device: torch.device) -> None:
    """Give back the memory of models that nobody refers to, also of those in reference cycles."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def keep_freed_memory() -> bool:
    """Let this process keep the memory that it frees, and return whether that is possible.

    glibc returns the memory of large tensors to the system at once and fetches it again, cleared,
    at the next step, which costs the lab's autoencoder a third of its time on a CPU. Use this for
    small models only: large ones free memory in pieces, and could lack it later. It has an effect
    with glibc alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
