"""What a step of a training takes, in memory and arithmetic, without loading or computing anything.

The prediction is the training itself, run once on tensors that have shapes and no content: every
storage that comes to be or goes away is entered into a ledger, and every product's operations are
counted. So nothing is guessed of a model's inside, and a model that is new needs nothing here.
"""

from __future__ import annotations

import inspect
import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

from videorepa.align import in_backward
from videorepa.backbones import Backbone, BackboneShapes, Text
from videorepa.device import compute_dtype
from videorepa.memory import moment_bytes
from videorepa.recipe import Recipe
from videorepa.student import Batch, Student
from videorepa.tokens import TokenGrid

WORKING = 32e6
"""Bytes by which Python and its libraries grow at work, beside the tensors: fitted to what
benchmarks/memory.py measures."""


@dataclass(frozen=True)
class Cost:
    """What one step of a training takes, on one device.

    parts: bytes at the moment of the step's peak, by what they are for. loading: bytes at the worst
    moment before, or 0 where that is not known. operations: floating-point, of the whole step, a
    multiplication and an addition being two.
    """

    device: torch.device
    dtype: torch.dtype
    parts: dict[str, int]
    loading: int
    operations: float

    @property
    def peak(self) -> int:
        """Bytes, all parts together, or those of loading if they are more."""
        return max(sum(self.parts.values()), self.loading)


def predict(recipe: Recipe, device: torch.device) -> Cost:
    """Run one step on shapes; nothing is read, loaded or computed.

    device: what it is predicted for; it need not be there. On the CPU the process itself is a part
    of the peak, as it is of what the system measures: that of now, with the libraries that are
    installed. Teachers that are online, validation clips and, with FSDP2, the sharding are not in
    it.
    """
    dtype = compute_dtype(recipe.train.precision, device)
    if device.type == "cuda" and recipe.train.precision == "auto":
        dtype = torch.bfloat16
    with torch.device("meta"):
        student = Student(recipe, torch.device("meta"), dtype)
    process = psutil.Process().memory_info().rss
    ledger = _Ledger()
    skipped = _skip_repeats(student, ledger)
    with FakeTensorMode(allow_non_fake_inputs=True), ledger:
        # From here on tensors say that they are on the CPU, which autocast goes by.
        cpu = torch.device("cpu")
        left_out = {module for block in skipped for module in block.modules()}
        for module in student.modules():
            if module not in left_out:
                module.to_empty(device=cpu, recurse=False)
        student.device = student.backbone.device = cpu
        trained, terms = list(student.trained.values()), list(student.terms.parameters())
        frozen = [p for p in student.transformer.parameters() if not p.requires_grad]
        ledger.enter("weights", *frozen)
        if recipe.memory.offload == "group":
            ledger.add("weights", max(map(_bytes, frozen)) - sum(map(_bytes, frozen)))
        ledger.enter("weights", *trained, *student.transformer.buffers())
        ledger.enter("alignment", *terms)
        for part, parameters in (("optimiser", trained), ("alignment", terms)):
            ledger.add(part, sum(moment_bytes(recipe, p) for p in parameters))
        if recipe.train.ema is not None:
            ledger.add("averages", sum(_bytes(p) for p in trained))
        for part, parameters in (("gradients", trained), ("alignment", terms)):
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, part=part: ledger.enter(part, p.grad)
                )
        student.terms.register_forward_pre_hook(lambda *_: ledger.within("alignment"))
        student.terms.register_forward_hook(lambda *_: ledger.within("activations"))
        if recipe.optim.accumulate > 1:  # Gradients of the micro-batch before are there.
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            ledger.enter("gradients", *(p.grad for p in trained))
        ledger.start()
        with student.tapped():
            denoised, aligned = student(0, _batch(recipe, student.backbone, ledger))
            (denoised.loss.mean() + aligned.loss).backward()
    parts = {part: ledger.at_peak[part] for part in PARTS if ledger.at_peak[part]}
    loading = 0
    if device.type == "cpu":
        parts["process"] = process + int(WORKING)
        # Adapters are made when all is loaded.
        held = frozen if recipe.train.lora is not None else trained
        worst = _while_loading(recipe, sum(map(_bytes, held)))
        loading = worst and worst + parts["process"]
    return Cost(device, dtype, parts, loading, ledger.operations * recipe.optim.accumulate)


PARTS = ("weights", "gradients", "optimiser", "averages", "activations", "alignment")
"""What bytes can be for. Activations include what comes and goes within a layer; the alignment's
are its projectors with gradients and moments, features, and what its losses keep."""


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _while_loading(recipe: Recipe, held: int) -> int:
    """Bytes of weights at the worst moment of loading `held` bytes of them into the machine's
    memory. A file that they come from counts as long as one of its weights has to be taken out."""
    files = [path.stat().st_size for path in recipe.backbone.weight_files()]
    whole = sum(files)
    if recipe.memory.frozen == "float32" and whole >= held:
        return held  # They stay in the files, mapped.
    worst = (
        held * done // whole + size for done, size in zip(accumulate(files), files, strict=True)
    )
    return max(worst, default=0)


def _skip_repeats(student: Student, ledger: _Ledger) -> list[nn.Module]:
    """Have all but a few of a transformer's like blocks replaced by entries; gives these blocks.

    Blocks are alike if their parameters are and no term taps them. Of each run of like blocks the
    first two and the last two stay. What the ledger is told from the beginning of the second until
    the beginning of the third, it is told again for each block that passes its input through, and
    in the backward pass what it is told of the last but one.
    """
    backbone = student.backbone
    blocks = student.recipe.backbone.shapes(student.recipe.data).blocks
    each = {number: backbone.block(number) for number in range(1, blocks + 1)}
    tapped = {
        side for _, term in student.terms.named() for side in (term.align.block, term.align.target)
    }
    has_trained, pairs, skipped = False, {}, []

    def kind(number: int) -> Any:
        nonlocal has_trained
        parameters = dict(each[number].named_parameters())
        has_trained = has_trained or any(p.requires_grad for p in parameters.values())
        if number in tapped:
            return number
        form = [(name, p.shape, p.dtype, p.requires_grad) for name, p in parameters.items()]
        return type(each[number]), has_trained, form

    def begin(way: str, number: int, like: int) -> None:
        ledger.begin((way, number))
        if like != number:
            ledger.repeat((way, like))

    def watch(number: int, forward_like: int, backward_like: int) -> None:
        def before(*_: Any) -> None:
            if not in_backward():
                begin("forward", number, forward_like)

        def after(block: nn.Module, given: Any, output: Any) -> Any:
            if in_backward():
                return output
            pairs[number] = isinstance(output, tuple)
            if number == blocks:
                ledger.begin(BETWEEN)
            tensors = output if isinstance(output, tuple) else (output,)
            marked = _Boundary.apply(partial(begin, "backward", number, backward_like), *tensors)
            return marked if isinstance(output, tuple) else marked[0]

        each[number].register_forward_pre_hook(before)
        each[number].register_forward_hook(after)

    def skip(number: int, like: int) -> None:
        block = each[number]
        signature = inspect.signature(block.forward)

        def pass_through(*given: Any, **named: Any) -> Any:
            tensors = signature.bind(*given, **named).arguments
            video = tensors["hidden_states"]
            return (video, tensors["encoder_hidden_states"]) if pairs[like] else video

        block.forward = pass_through
        skipped.append(block)

    for _, run in groupby(each, kind):
        numbers = list(run)
        for place, number in enumerate(numbers):
            if 2 <= place < len(numbers) - 2:
                skip(number, numbers[1])
                watch(number, numbers[1], numbers[-2])
            else:
                watch(number, number, number)
    return skipped


class _Boundary(torch.autograd.Function):
    """Calls when the backward pass comes by; tensors go through as they are."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tensors

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None):
        ctx.call()
        return None, *gradients


def _batch(recipe: Recipe, backbone: Backbone, ledger: _Ledger) -> Batch:
    shapes, count = recipe.backbone.shapes(recipe.data), recipe.optim.batch_size
    latents = torch.empty(count, *shapes.latents)
    ledger.within("alignment")
    teachers = {
        term.encoder: TokenGrid.batch([_on_cpu(term.encoder.shape(recipe.data.frames))] * count)
        for term in recipe.terms.values()
        if term.encoder is not None
    }
    ledger.within("activations")
    timestep = backbone.sample_timesteps(latents, torch.Generator())
    return Batch(latents, _text(shapes, count), torch.empty_like(latents), timestep, teachers)


def _on_cpu(grid: TokenGrid) -> TokenGrid:
    saliency = None if grid.saliency is None else torch.empty(grid.saliency.shape)
    return replace(grid, tokens=torch.empty(grid.tokens.shape), saliency=saliency)


def _text(shapes: BackboneShapes, count: int) -> Text:
    return {
        name: torch.empty(count, *one.shape, dtype=one.dtype) for name, one in shapes.text.items()
    }


BETWEEN = "between the forward pass and the backward pass"


class _Ledger(TorchDispatchMode):
    """Enters every storage that comes to be, and crosses it out when it is gone.

    The step is divided into spans, so that the entries of one can be made once more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, tuple[int, str, Any, Any]] = {}
        self.now: Counter[str] = Counter()
        self.operations = 0.0
        self._part = "activations"
        self.start()

    def start(self) -> None:
        """Forget what the peak was until now."""
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
        """Enter all that happened in a span, again."""
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
        """What comes to be from here on is for that part."""
        self._part = part

    def add(self, part: str, size: int) -> None:
        """Enter bytes that stay, without a tensor."""
        self.now[part] += size

    def enter(self, part: str, *tensors: Tensor | None) -> None:
        """Say what tensors are for."""
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
        # What goes when no block runs, such as the weights that autocast has cast, goes for all
        # blocks at once.
        times = 1 + self._repeated[span] if self._span == BETWEEN else 1
        self.now[part] -= size * times

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return 1  # There is no content to read; values are for the log alone.
        if func is torch.ops.prim.device.default:
            return args[0].fake_device  # Most calls are this one, which is slow otherwise.
        if func is torch.ops.aten.nonzero.default:
            return torch.empty(_selected(args[0]), args[0].dim(), dtype=torch.long)
        if func is torch.ops.aten.index.Tensor:
            args = args[0], _as_numbers(args[1])
        result = func(*args, **kwargs)
        if func is torch.ops.aten.bitwise_not.default:
            result.is_false = not getattr(args[0], "is_false", False)
        count = OPERATIONS.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if count is not None:
            self.operations += count(*args, **kwargs, out_val=result)
        for value in tree_leaves(result):
            # Tensors on the meta device are shapes and no more in the training too.
            is_real = isinstance(value, Tensor) and value.device.type != "meta"
            if is_real and value.untyped_storage()._cdata not in self.live:
                self.enter(self._part, value)
        return result


def _selected(mask: Tensor) -> int:
    """How many elements a mask chooses. It has no content: masks say which tokens of the text are
    there, and the most that can be is all of them."""
    return 0 if getattr(mask, "is_false", False) else mask.numel()


def _as_numbers(indices: Iterable[Tensor | None]) -> list[Tensor | None]:
    """Indices for `x[indices]` without masks."""
    found: list[Tensor | None] = []
    for index in indices:
        if index is not None and index.dtype == torch.bool:
            found += [torch.empty(_selected(index), dtype=torch.long)] * index.dim()
        else:
            found.append(index)
    return found


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _attention_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> int:
    return sdpa_backward_flop_count(gradient.shape, query.shape, key.shape, value.shape)


OPERATIONS = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}
"""Operators that torch.utils.flop_counter does not know."""
