"""Counts the memory and the operations of a step that runs on shapes alone."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

PARTS = ("weights", "gradients", "optimiser", "averages", "activations", "alignment")
"""The parts of a training's memory.

Activations include the temporary tensors of a layer. The alignment's bytes are its projectors with
their gradients and moments, the features, and what its losses keep for the backward pass.
"""


BETWEEN = "between the forward pass and the backward pass"


class Ledger(TorchDispatchMode):
    """Records the bytes of every storage from its creation to its end, and counts operations.

    A step is divided into spans, so that the records of one can be repeated.

    Attributes:
      now: Bytes by part, at present.
      at_peak: Bytes by part, when their sum was largest since `start`.
      operations: Floating-point operations since `start`.

    Args:
      like_cuda: Whether tensors on the CPU stand for tensors on a GPU.
    """

    def __init__(self, like_cuda: bool = False) -> None:
        super().__init__()
        self._like_cuda = like_cuda
        self.live: dict[int, tuple[int, str, Any, Any]] = {}
        self.now: Counter[str] = Counter()
        self.operations = 0.0
        self._part = "activations"
        self.start()

    def start(self) -> None:
        """Forget the peak and the operations until now."""
        self.at_peak = self.now.copy()
        self.operations = 0.0
        self._spans: dict[Any, tuple[Counter[str], Counter[str], float]] = {}
        self._repeated: Counter[Any] = Counter()
        self._open(None)

    def _open(self, span: Any) -> None:
        self._span, self._before, self._operations = span, self.now.copy(), self.operations
        self._highest = self.now.copy()

    def begin(self, span: Any) -> None:
        """End a span and begin the next."""
        rise, change = self._highest.copy(), self.now.copy()
        rise.subtract(self._before)
        change.subtract(self._before)
        self._spans[self._span] = rise, change, self.operations - self._operations
        self._open(span)

    def repeat(self, span: Any) -> None:
        """Record all that happened in a span once more."""
        rise, change, operations = self._spans[span]
        self._repeated[span] += 1
        highest = self.now.copy()
        highest.update(rise)
        self._note(highest)
        self.now.update(change)
        self.operations += operations

    def _note(self, amounts: Counter[str]) -> None:
        total = amounts.total()
        if total > self._highest.total():
            self._highest = amounts.copy()
        if total > self.at_peak.total():
            self.at_peak = amounts.copy()

    def within(self, part: str) -> None:
        """Record the storages that are created from here on under a part."""
        self._part = part

    def add(self, part: str, size: int) -> None:
        """Record bytes that no tensor accounts for."""
        self.now[part] += size
        self._note(self.now)

    def enter(self, part: str, *tensors: Tensor | None) -> None:
        """Record tensors under a part, or move them to it."""
        for tensor in tensors:
            if tensor is None:
                continue
            storage = tensor.untyped_storage()
            key = storage._cdata
            if key in self.live:
                size, before, span, reference = self.live[key]
                self.now[before] -= size
            else:
                size, span = storage.nbytes(), self._span
                reference = weakref.ref(storage, lambda _, key=key: self._gone(key))
            self.live[key] = size, part, span, reference
            self.now[part] += size
        self._note(self.now)

    def _gone(self, key: int) -> None:
        size, part, span, _ = self.live.pop(key, (0, self._part, None, None))
        # A storage that ends while no block runs, such as a weight that autocast has cast, ends for
        # all repeated blocks at once.
        times = 1 + self._repeated[span] if self._span == BETWEEN else 1
        self.now[part] -= size * times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # There is no content to read; only the log wants the value.
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # Most calls are this one, which is slow otherwise.
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(_selected(args[0]), args[0].dim(), dtype=torch.long)
        if func is torch.ops.aten.index.Tensor:
            args = args[0], _as_numbers(args[1])
        result: Any = func(*args, **kwargs)
        if func is torch.ops.aten.native_layer_norm.default and self._like_cuda:
            result = result[0], *(statistic.float() for statistic in result[1:])
        if func is torch.ops.aten.bitwise_not.default:
            result.is_false = not getattr(args[0], "is_false", False)
        count = OPERATIONS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            # The training has tensors on the meta device too, which take no bytes.
            is_real = isinstance(value, Tensor) and value.device.type != "meta"
            if is_real and value.untyped_storage()._cdata not in self.live:
                self.enter(self._part, value)
        return result


def _selected(mask: Tensor) -> int:
    """Count the elements that a mask without content chooses: at most all, which is assumed."""
    return 0 if getattr(mask, "is_false", False) else mask.numel()


def _as_numbers(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Replace the masks in the indices of `x[indices]` by numbers."""
    numbers: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            numbers += [torch.empty(_selected(index), dtype=torch.long)] * index.dim()
        else:
            numbers.append(index)
    return numbers


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor | None, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    if gradient is None:  # Nothing depends on this attention, such as that of sound beside a video.
        return 0
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


OPERATIONS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Counts for the operators that torch.utils.flop_counter does not know."""
