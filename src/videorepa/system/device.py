"""Which device to run on, and which precision is worth using there."""

from __future__ import annotations

import ctypes
import platform
from typing import Literal

import torch

Precision = Literal["auto", "float32"]

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Of glibc's mallopt."""


def pick_device(name: str | None = None) -> torch.device:
    """The named device, or the first GPU, or the CPU."""
    return torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 arithmetic is done by the hardware. A CPU without it emulates it, which is
    over a hundred times slower than float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return True


def compute_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """The dtype to compute in: bfloat16, unless float32 is asked for or the hardware lacks it."""
    if precision == "float32" or not has_fast_bfloat16(device):
        return torch.float32
    return torch.bfloat16


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Matrix products and convolutions in `dtype`; nothing changes for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def keep_freed_memory() -> bool:
    """From now on, let this process keep memory that it has freed; gives whether that was possible.

    glibc gives large tensors back at once and takes them anew, cleared, at the next step: a third
    of the time of the lab's autoencoder on a CPU. It is for small models; what large ones free in
    pieces could be missing later. Other allocators are left alone.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(M_MMAP_MAX, 0) and libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
