"""Lets autocast treat tensors on the CPU as it would treat them on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library
from torch.utils._pytree import tree_map

IN_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log1p", "log2"),
    *("pow.Scalar", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "reciprocal", "rsqrt", "sinh"),
    *("softplus", "tan", "dist", "renorm", "logsumexp", "cosine_similarity"),
    *("group_norm", "layer_norm", "native_layer_norm", "rms_norm"),
    *("upsample_bicubic2d", "upsample_bilinear2d", "upsample_linear1d", "upsample_nearest1d"),
    *("upsample_nearest2d", "upsample_nearest3d", "upsample_trilinear3d"),
)
"""Operators that autocast runs in float32 on CUDA and in the dtype of their arguments on a CPU.

From ATen/autocast_mode.h.
"""

TO_FLOAT32 = (
    *("softmax.int", "log_softmax.int", "sum", "sum.dim_IntList", "cumsum", "cumprod"),
    *("linalg_vector_norm", "linalg_matrix_norm"),
)
"""Operators whose result autocast makes float32 on CUDA, where no other dtype is asked for."""


@contextmanager
def cuda_rules() -> Iterator[None]:
    """Add to the CPU's autocast what CUDA's does besides, while the context is open."""
    library = Library("aten", "IMPL")
    try:
        for names, rule in ((IN_FLOAT32, _in_float32), (TO_FLOAT32, _to_float32)):
            for name in names:
                packet, _, overload = name.partition(".")
                operator = getattr(getattr(torch.ops.aten, packet), overload or "default")
                library.impl(name, partial(rule, operator), "AutocastCPU")
        yield
    finally:
        library._destroy()


def _in_float32(operator: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        return operator(*tree_map(_widened, arguments), **tree_map(_widened, named))


def _to_float32(operator: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    with torch.autocast("cpu", enabled=False):
        has_dtype = any(isinstance(value, torch.dtype) for value in (*arguments, *named.values()))
        if _is_narrow(arguments[0]) and not has_dtype:
            named["dtype"] = torch.float32
        return operator(*arguments, **named)


def _is_narrow(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dtype in (torch.bfloat16, torch.float16)


def _widened(value: Any) -> Any:
    return value.float() if _is_narrow(value) else value
