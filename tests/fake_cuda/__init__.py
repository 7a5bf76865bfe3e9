"""A CUDA device without a GPU, on which tensors have shapes and no content.

FakeTensorMode on a CPU build of torch refuses the device "cuda", because nothing is registered for
it. `guard.cpp` registers a device that does nothing. With it, forward passes, checkpointing,
backward passes and autocast run on shapes alone by CUDA's own rules: autocast's lists, operators
that wait for the device, copies between devices. So a test sees tensors on the wrong device,
`.item()` within a step, the bytes that a step takes, and how many operators it calls. It says
nothing of speed, and nothing of what a kernel computes.

torch looks for devices once, so the library has to be there before torch is: it is preloaded into a
process of its own, one for a session of pytest. A test hands over a function that is defined at the
top of its module, with arguments that can be pickled, and gets what the function returns:

    def dtype_of_a_norm() -> torch.dtype:
        with FakeTensorMode(), torch.autocast("cuda", torch.bfloat16):
            norm = torch.nn.LayerNorm(8, device="cuda", dtype=torch.bfloat16)
            return norm(torch.empty(2, 8, device="cuda", dtype=torch.bfloat16)).dtype

    def test_norms_are_computed_in_float32(fake_cuda) -> None:
        assert fake_cuda(dtype_of_a_norm) == torch.float32

The function begins without a mode: nothing but tensors under FakeTensorMode can be on the device.
What it raises is raised in the test. Where the library cannot be built, these tests are skipped.
"""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

GUARD = Path(__file__).with_name("guard.cpp")


def obstacle() -> str | None:
    """Say why no device can be pretended here, if so."""
    if not sys.platform.startswith("linux"):
        return "a CUDA device is pretended on Linux alone"
    if torch.version.cuda is not None:
        return "this build of torch has a CUDA device of its own"
    if shutil.which("g++") is None:
        return "there is no g++ to build a pretended CUDA device with"
    if not (Path(torch.__file__).parent / "include" / "ATen").is_dir():
        return "torch's headers are not installed, which a pretended CUDA device is built with"
    return None


def built(folder: Path) -> Path:
    """Build the library in a folder, if it is not there: it takes a second."""
    root = Path(torch.__file__).parent  # The library finds torch there, in this environment alone.
    made_of = GUARD.read_bytes() + f"{torch.__version__} {root}".encode()
    library = folder / f"fake-cuda-{sha256(made_of).hexdigest()[:16]}.so"
    if not library.exists():
        unfinished = library.with_suffix(f".{os.getpid()}")  # Others may build it just now.
        subprocess.run(
            [
                *("g++", "-O1", "-shared", "-fPIC", "-std=c++20", str(GUARD)),
                *("-o", str(unfinished), f"-I{root}/include"),
                *(f"-L{root}/lib", f"-Wl,-rpath,{root}/lib", "-ltorch_cpu", "-lc10"),
            ],
            check=True,
        )
        unfinished.replace(library)
    return library


@contextmanager
def pretended(library: Path) -> Iterator[Callable[..., Any]]:
    """Start a process with the device, and give a function that calls another one there."""
    before = os.environ.get("LD_PRELOAD")
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=_begin) as process:
        os.environ["LD_PRELOAD"] = f"{library}:{before}" if before else str(library)
        try:
            process.submit(str).result()  # It is started here.
        finally:
            os.environ.pop("LD_PRELOAD") if before is None else os.environ.update(LD_PRELOAD=before)
        yield lambda function, *arguments, **named: process.submit(
            _called, function, *arguments, **named
        ).result()


def _called(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    try:
        return function(*arguments, **named)
    except Exception as error:
        try:
            pickle.dumps(error)
        except Exception:  # FakeTensorMode's errors can hold what cannot be sent.
            raise RuntimeError(f"{type(error).__name__}: {error}") from None
        raise


def _begin() -> None:
    """Let torch's Python take the device for a recent GPU."""
    os.environ.pop("LD_PRELOAD")  # Not for the processes that this one starts.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    torch.nn.functional.scaled_dot_product_attention = _attention
    # Without a kernel for the device, torch would take this one apart, and keep the pieces.
    KERNELS.impl("silu_backward", lambda gradient, x: torch.empty_like(x), "CUDA")


KERNELS = torch.library.Library("aten", "IMPL")

_on_the_cpu = torch.nn.functional.scaled_dot_product_attention


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Call the operator that a GPU would choose; the CPU build's choice keeps all scores."""
    options: dict[str, Any] = {"dropout_p": dropout_p, "is_causal": is_causal, "scale": scale}
    if query.device.type != "cuda":
        return _on_the_cpu(query, key, value, attn_mask, **options, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("cuda"):
        dtype = torch.get_autocast_dtype("cuda")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
        if attn_mask is not None and attn_mask.is_floating_point():
            attn_mask = attn_mask.to(dtype)
    aten = torch.ops.aten
    with torch.autocast("cuda", enabled=False):
        if attn_mask is None and query.dtype in (torch.bfloat16, torch.float16):
            return aten._scaled_dot_product_flash_attention(query, key, value, **options)[0]
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                bias = torch.zeros_like(attn_mask, dtype=query.dtype)
                attn_mask = bias.masked_fill_(attn_mask.logical_not(), float("-inf"))
            attn_mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
        needs_sums = query.requires_grad or key.requires_grad or value.requires_grad
        return aten._scaled_dot_product_efficient_attention(
            query, key, value, attn_mask, needs_sums, **options
        )[0]
