"""Predicts the memory and arithmetic of a training step, without loading or computing anything.

The prediction runs the training's own code once, on tensors that have shapes and no content. A
ledger records every storage from its creation to its end, and counts the operations of every
product. So the prediction knows nothing of a model's structure, and a new model needs no code here.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import nullcontext
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
from videorepa.data.batches import Batch
from videorepa.recipe import Recipe
from videorepa.system.device import autocast, compute_dtype
from videorepa.tokens import TokenGrid
from videorepa.training.cuda_rules import cuda_rules
from videorepa.training.ledger import BETWEEN, PARTS, Ledger
from videorepa.training.memory import frozen_form, moment_bytes, update_bytes
from videorepa.training.student import Student

CPU = torch.device("cpu")

WORKING_BYTES = 32e6
"""The bytes, besides tensors, by which a process grows while it trains.

Fitted to the measurements of timings/memory.py.
"""


CONTEXT_BYTES = 0.6e9
"""The bytes that CUDA takes for itself: an assumption, which no measurement stands behind yet."""


@dataclass(frozen=True)
class Cost:
    """The memory and arithmetic that one training step takes on one device.

    Attributes:
      device: The device of the prediction.
      dtype: The dtype that the step computes in.
      parts: Bytes at the step's peak, by what they are for.
      loading: Bytes at the worst moment of loading; 0 if it is not predicted. On a GPU it never
        takes more than the step, since weights go there in the form in which they are held.
      validation: Bytes at the worst moment of sampling a validation clip on a GPU; 0 without.
      operations: Floating-point operations of the whole step; a multiply-add counts as two.
    """

    device: torch.device
    dtype: torch.dtype
    parts: dict[str, int]
    loading: int
    validation: int
    operations: float

    @property
    def peak(self) -> int:
        """Bytes at the step's peak, while loading or while validating, whichever are most."""
        return max(sum(self.parts.values()), self.loading, self.validation)


def predict(recipe: Recipe, device: torch.device, place: torch.device = CPU) -> Cost:
    """Predict the cost of one step by running it on shapes.

    It leaves out online teachers and, with FSDP2, the sharding.

    Args:
      recipe: The training.
      device: The device to predict for; it need not exist here. On the CPU, the process is a part
        of the peak, as it is for the operating system; its size is that of this process now.
      place: Where the tensors claim to be. This matters to autocast, whose rules are made to be
        those of `device`.
    """
    dtype = compute_dtype(recipe.train.precision, device)
    if device.type == "cuda" and recipe.train.precision == "auto":
        dtype = torch.bfloat16
    with torch.device("meta"):
        student = Student(recipe, torch.device("meta"), dtype)
        vae = None
        if recipe.validation is not None and recipe.validation.prompts and device.type == "cuda":
            vae = recipe.backbone.vae_skeleton(student.backbone.vae_dtype)
    process = psutil.Process().memory_info().rss
    stands_in = device.type == "cuda" != place.type
    ledger = Ledger(like_cuda=stands_in)
    skipped = _skip_repeats(student, ledger)
    rules = cuda_rules() if stands_in else nullcontext()
    with FakeTensorMode(allow_non_fake_inputs=True), ledger, rules:
        left_out = {module for block in skipped for module in block.modules()}
        for module in student.modules():
            if module not in left_out:
                module.to_empty(device=place, recurse=False)
        student.device = student.backbone.device = place
        trained, terms = list(student.trained.values()), list(student.terms.parameters())
        frozen = [p for p in student.transformer.parameters() if not p.requires_grad]
        ledger.enter("weights", *frozen)
        if recipe.memory.offload == "group":
            sizes = [p.nbytes for p in frozen]
            ledger.add("weights", max(sizes) - sum(sizes))  # At most one of them is there.
        ledger.enter("weights", *trained, *student.transformer.buffers())
        ledger.enter("alignment", *terms)
        for part, parameters in (("optimiser", trained), ("alignment", terms)):
            ledger.add(part, sum(moment_bytes(recipe, p) for p in parameters))
        if recipe.train.ema is not None:
            ledger.add("averages", sum(p.nbytes for p in trained))
        always = ledger.now.copy()
        for part, parameters in (("gradients", trained), ("alignment", terms)):
            for parameter in parameters:
                parameter.register_post_accumulate_grad_hook(
                    lambda p, part=part: ledger.enter(part, p.grad)
                )
        student.terms.register_forward_pre_hook(lambda *_: ledger.within("alignment"))
        student.terms.register_forward_hook(lambda *_: ledger.within("activations"))
        if recipe.optim.accumulate > 1:  # Gradients of earlier micro-batches exist.
            for parameter in trained:
                parameter.grad = torch.empty_like(parameter)
            ledger.enter("gradients", *(p.grad for p in trained))
        ledger.start()
        with student.tapped():
            with place:
                batch = _batch(recipe, student.backbone, ledger)
            denoised, aligned = student(0, batch)
            (denoised.loss.mean() + aligned.loss).backward()
        ledger.add("optimiser", update_bytes(recipe, [*trained, *terms], device))
        parts = {part: ledger.at_peak[part] for part in PARTS if ledger.at_peak[part]}
        operations = ledger.operations * recipe.optim.accumulate
        loading = validation = 0
        if vae is not None:
            del batch, denoised, aligned
            student.zero_grad()
            ledger.now = always
            validation = _while_validating(student, vae, place, ledger) + int(CONTEXT_BYTES)
    if device.type == "cuda":
        parts["context"] = int(CONTEXT_BYTES)
    if device.type == "cpu":
        parts["process"] = process + int(WORKING_BYTES)
        # Adapters are made after loading.
        held = frozen if recipe.train.lora is not None else trained
        is_mapped = frozen_form(recipe, dtype) == "float32"
        worst = _while_loading(recipe, sum(p.nbytes for p in held), is_mapped)
        loading = worst and worst + parts["process"]
    return Cost(device, dtype, parts, loading, validation, operations)


def _while_validating(student: Student, vae: Any, place: torch.device, ledger: Ledger) -> int:
    """Count the bytes at the worst moment of sampling a validation clip.

    The transformer is run on the prompt and the negative prompt at once, as most pipelines do.
    """
    recipe, backbone = student.recipe, student.backbone
    shapes = recipe.backbone.shapes(recipe.data)
    frames, channels, height, width = shapes.latents
    ledger.start()
    student.transformer.eval()
    with torch.no_grad(), place:
        count = 1 + (recipe.generation.guidance_scale > 1)
        latents, text = torch.empty(count, *shapes.latents), _text(shapes, count)
        inputs = backbone.inputs(
            latents, text, backbone.sample_timesteps(latents, torch.Generator())
        )
        with autocast(place, student.dtype):
            backbone.transformer(**inputs, return_dict=False)
        del latents, text, inputs
        for module in vae.modules():
            module.to_empty(device=place, recurse=False)
        ledger.enter("weights", *vae.parameters())
        backbone.vae = vae
        if recipe.generation.tiling:
            backbone.tile(recipe.data)
        vae.decode(torch.empty(1, channels, frames, height, width, dtype=backbone.vae_dtype))
    return ledger.at_peak.total()


def _while_loading(recipe: Recipe, held: int, is_mapped: bool) -> int:
    """Count the bytes of weights at the worst moment of loading `held` bytes of them.

    A file counts until the last of its weights has been taken out.
    """
    files = [path.stat().st_size for path in recipe.backbone.weight_files()]
    whole = sum(files)
    if is_mapped and whole >= held:
        return held  # The weights stay in the files.
    worst = (
        held * done // whole + size for done, size in zip(accumulate(files), files, strict=True)
    )
    return max(worst, default=0)


def _skip_repeats(student: Student, ledger: Ledger) -> list[nn.Module]:
    """Let most of a transformer's equal blocks be recorded without running; return these blocks.

    Blocks are equal if their parameters are, both or neither are checkpointed, and no term taps
    them. Of each run of equal blocks the first two and the last two run. A skipped block passes its
    input through, and the ledger repeats for it what it recorded of the second block in the forward
    pass, and of the last but one in the backward pass.
    """
    backbone = student.backbone
    if "audio_hidden_states" in inspect.signature(backbone.block(1).forward).parameters:
        return []  # Sound gets no gradient, which a skipped block would not know.
    blocks = student.recipe.backbone.shapes(student.recipe.data).blocks
    each = {number: backbone.block(number) for number in range(1, blocks + 1)}
    tapped = student.terms.blocks
    has_trained, pairs, skipped = False, {}, []

    def kind(number: int) -> Any:
        nonlocal has_trained
        parameters = dict(each[number].named_parameters())
        has_trained = has_trained or any(p.requires_grad for p in parameters.values())
        if number in tapped:
            return number
        form = [(name, p.shape, p.dtype, p.requires_grad) for name, p in parameters.items()]
        is_checkpointed = student.recipe.memory.checkpoints(number)
        return type(each[number]), is_checkpointed, has_trained, form

    def begin(way: str, number: int, like: int) -> None:
        ledger.begin((way, number))
        if like != number:
            ledger.repeat((way, like))

    def watch(number: int, forward_like: int, backward_like: int) -> None:
        def before(*_: Any) -> None:
            if not in_backward():
                begin("forward", number, forward_like)

        def after(block: nn.Module, arguments: Any, output: Any) -> Any:
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

        def pass_through(*arguments: Any, **named: Any) -> Any:
            video, text, *_ = signature.bind(*arguments, **named).arguments.values()
            return (video, text) if pairs[like] else video

        block.forward = pass_through
        skipped.append(block)

    for _, run in groupby(each, kind):
        numbers = list(run)
        for position, number in enumerate(numbers):
            if 2 <= position < len(numbers) - 2:
                skip(number, numbers[1])
                watch(number, numbers[1], numbers[-2])
            else:
                watch(number, number, number)
    return skipped


class _Boundary(torch.autograd.Function):
    """Passes tensors through, and makes a call when the backward pass reaches them."""

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
        term.encoder: TokenGrid.batch(
            [_without_content(term.encoder.shape(recipe.data.frames))] * count
        )
        for term in recipe.terms.values()
        if term.encoder is not None
    }
    ledger.within("activations")
    timestep = backbone.sample_timesteps(latents, torch.Generator())
    opening = backbone.blank_opening(recipe.data, count)
    text = _text(shapes, count)
    return Batch(latents, text, torch.empty_like(latents), timestep, teachers, opening)


def _without_content(grid: TokenGrid) -> TokenGrid:
    saliency = None if grid.saliency is None else torch.empty(grid.saliency.shape)
    return replace(grid, tokens=torch.empty(grid.tokens.shape), saliency=saliency)


def _text(shapes: BackboneShapes, count: int) -> Text:
    return {
        name: torch.empty(count, *one.shape, dtype=one.dtype) for name, one in shapes.text.items()
    }
