"""What a step of a training takes, in memory and arithmetic, without loading or computing anything.

The prediction is the training itself, run once on tensors that have shapes and no content: every
storage that comes to be or goes away is entered into a ledger, and every product's operations are
counted. So nothing is guessed of a model's inside, and a model that is new needs nothing here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, groupby
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from videorepa.align.taps import in_backward
from videorepa.backbones import Backbone, BackboneShapes, Text
from videorepa.data.loader import Batch
from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype
from videorepa.tokens import TokenGrid
from videorepa.training.ledger import BETWEEN, PARTS, Ledger, size_in_bytes
from videorepa.training.memory import moment_bytes
from videorepa.training.student import Student

WORKING = 32e6
"""Bytes by which Python and its libraries grow at work, beside the tensors: fitted to what
timings/memory.py measures."""


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
    ledger = Ledger()
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
            ledger.add("weights", max(map(size_in_bytes, frozen)) - sum(map(size_in_bytes, frozen)))
        ledger.enter("weights", *trained, *student.transformer.buffers())
        ledger.enter("alignment", *terms)
        for part, parameters in (("optimiser", trained), ("alignment", terms)):
            ledger.add(part, sum(moment_bytes(recipe, p) for p in parameters))
        if recipe.train.ema is not None:
            ledger.add("averages", sum(size_in_bytes(p) for p in trained))
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
        worst = _while_loading(recipe, sum(map(size_in_bytes, held)))
        loading = worst and worst + parts["process"]
    return Cost(device, dtype, parts, loading, ledger.operations * recipe.optim.accumulate)


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


def _skip_repeats(student: Student, ledger: Ledger) -> list[nn.Module]:
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


def _batch(recipe: Recipe, backbone: Backbone, ledger: Ledger) -> Batch:
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
