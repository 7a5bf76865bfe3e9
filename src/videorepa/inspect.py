"""Works out a recipe's shapes, parameters, disk space and cost without loading any weights."""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property

import torch

from videorepa.align.contract import Contract, check
from videorepa.align.terms import Grids
from videorepa.data.sampling import Sampling, sampling_notes
from videorepa.data.source import ClipSource, open_source
from videorepa.errors import ClipError, UserError
from videorepa.recipe import Align, Recipe
from videorepa.settings.sections import ClipSize, Gate
from videorepa.system.device import pick_device
from videorepa.system.wording import count, shown
from videorepa.tokens import TokenGrid
from videorepa.training.context import check_context
from videorepa.training.cost import Cost, predict

LOOKED_AT = 100
"""Most videos whose headers are read."""

BYTES_MOMENTS, BYTES_TEXT, BYTES_FEATURES, BYTES_SCALE, BYTES_SALIENCY = 2, 2, 1, 4, 2

PROMPTS_SHOWN = 8

CARDS = (24, 48, 80)
"""Sizes of GPUs that a training may have to fit, in GB."""


@dataclass(frozen=True)
class Inspection:
    """The shapes and costs of a recipe; as text, a table of them.

    Attributes:
      contract: The shapes that the training will have.
      bytes_per_clip: Size of a clip's latents and text embeddings in the cache.
      feature_bytes_per_clip: Size of a clip's teacher features in the cache.
      device: The device that the training's cost is predicted for.
    """

    recipe: Recipe
    contract: Contract
    trained_parameters: int
    bytes_per_clip: int
    feature_bytes_per_clip: int
    device: torch.device

    @cached_property
    def cost(self) -> Cost:
        """Peak memory and operations of a step, computed on first use."""
        return predict(self.recipe, self.device)

    @cached_property
    def clips(self) -> int | None:
        """How many clips the recipe trains on, or None if their list cannot be read."""
        if self.recipe.data.lab is not None:
            return self.recipe.data.lab.clips
        return None if self._source is None else len(self._source.items)

    @cached_property
    def _source(self) -> ClipSource | None:
        try:
            return open_source(self.recipe.data)
        except UserError:
            return None

    @cached_property
    def samplings(self) -> dict[str, Sampling]:
        """How clips would be sampled from their videos, by their ids: of up to 100, spread over the
        list, those whose headers tell it."""
        samplings: dict[str, Sampling] = {}
        if self.recipe.data.lab is None and self._source is not None:
            clips = self._source.items
            for number in range(0, len(clips), math.ceil(len(clips) / LOOKED_AT)):
                with suppress(ClipError):
                    if sampling := self._source.foresee(number):
                        samplings[clips[number].id] = sampling
        return samplings

    def __str__(self) -> str:
        recipe, size = self.recipe, self.recipe.data
        shapes = self.contract.shapes
        frames, channels, height, width = shapes.latents
        lines = [
            f"{recipe.name}: {recipe.backbone.name} from {recipe.backbone.weights}",
            "",
            "student",
            f"  clip             {_times(size.frames, size.height, size.width)} RGB",
            f"  latents          {_times(frames, height, width)} x {channels}",
            f"  block output     {_shape(shapes.grid)}, after each of {shapes.blocks} blocks",
            *self._shown(),
        ]
        for name, term in recipe.terms.items():
            lines += ["", f"alignment: {name}", *self._term(term, self.contract.terms[name])]
            lines += self._left_out(name)
        lines += [
            "",
            "parameters",
            f"  transformer      {_count(shapes.parameters)}",
            f"  trained          {_count(self.trained_parameters)}"
            + ("" if recipe.train.lora is None else f" (LoRA, rank {recipe.train.lora.rank})")
            + (", from random weights" if recipe.train.from_scratch else ""),
            f"  projector        {_count(self.contract.projector_parameters)}, "
            "left behind at export",
            "",
            "cache, per clip",
            f"  latents and text {_size(self.bytes_per_clip)}",
            f"  features         {_size(self.feature_bytes_per_clip)}",
        ]
        if self.clips is not None:
            whole = self.clips * (self.bytes_per_clip + self.feature_bytes_per_clip)
            lines += [f"  all {self.clips:<12} {_size(whole)}"]
        if self.samplings:
            told = recipe.backbone.told_fps
            notes = sampling_notes(self.samplings, size.frames, told)
            lines += ["", f"clips, of {len(self.samplings)} looked at"]
            lines += [f"  {note}" for note in notes]
        if (validation := recipe.validation) is not None:
            lines += ["", f"validation, every {count(validation.every, 'step')}"]
            lines += [f"  prompts          {len(validation.prompts)}"]
            lines += [f"    {shown(prompt)}" for prompt in validation.prompts[:PROMPTS_SHOWN]]
            if more := validation.prompts[PROMPTS_SHOWN:]:
                lines += [f"    and {len(more)} more"]
            if validation.images:
                lines += [
                    f"  images           {len(validation.images)}, which their clips continue"
                ]
            if validation.pairs is not None:
                lines += [f"  pairs            {validation.pairs}"]
        return "\n".join([*lines, *self._cost()])

    def _cost(self) -> list[str]:
        cost, optim = self.cost, self.recipe.optim
        dtype = str(cost.dtype).removeprefix("torch.")
        speed, parallel = self.recipe.speed, self.recipe.parallel
        ignored = {
            "speed.attention": speed.attention is not None,
            "speed.compile": speed.compile,
            "parallel.context": parallel is not None and parallel.context > 1,
        }
        names = ", ".join(name for name, is_set in ignored.items() if is_set)
        return [
            "",
            f"peak memory, on one {cost.device.type} in {dtype}",
            *(f"  {part:<16} {_size(size)}" for part, size in cost.parts.items()),
            f"  together         {_size(sum(cost.parts.values()))}",
            *([f"  while loading    {_size(cost.loading)}"] if cost.loading else []),
            *([f"  in a validation  {_size(cost.validation)}"] if cost.validation else []),
            *([f"  fits             {_fits(cost.peak)}"] if cost.device.type == "cuda" else []),
            *([f"  not counted      what {names} changes"] if names else []),
            "",
            f"operations, per step of {optim.batch_size * optim.accumulate} clips",
            f"  floating-point   {cost.operations / 1e12:.3g} trillion",
        ]

    def _shown(self) -> list[str]:
        """What the model is shown of clips."""
        shown = self.recipe.backbone.shown_in_training(self.recipe.data)
        return [f"  shown            {shown}"] if shown else []

    def _left_out(self, name: str) -> list[str]:
        """Which steps a term does not compare, where the model is shown something."""
        if self.contract.continuation is None:
            return []
        lines = ["  left out, by how many latents are shown"]
        common = self.contract.terms[name].common
        common = common.steps(0, common.size[0] - self.recipe.terms[name].ahead)
        for latents, frame in self.contract.left_out[name].items():
            kept = common.since(frame) if frame else common
            steps = common.size[0] - kept.size[0]
            lines.append(
                f"    {latents:<14} {f'steps 0-{steps - 1}' if steps > 1 else 'step 0'}, "
                f"{math.prod(kept.size)} tokens are compared"
                if steps
                else f"    {latents:<14} nothing"
            )
        return lines

    def _term(self, term: Align, grids: Grids) -> list[str]:
        clip, common = self.recipe.data, grids.common
        tapped = {"clean": "predicted latents", "latents": "the clip's latents"}
        target = tapped.get(str(term.target), f"block {term.target}")
        if term.encoder is not None:
            encoder = term.encoder
            whole, piece = (encoder.frames, encoder.height, encoder.width), encoder.piece
            target = f"{encoder.name}, fed {_times(*whole)}"
            if piece != whole:
                target += f" in pieces of {_times(*piece)}"
        settings = term.loss.model_dump(exclude={"name"})
        options = ", ".join(f"{key} {value}" for key, value in settings.items())
        weight = f"{term.weight:g}" + (", measured only" if term.is_probe else "")
        return [
            f"  loss             {term.loss.name}" + (f" ({options})" if options else ""),
            f"  weight           {weight}",
            *([f"  by noise         {factors}"] if (factors := _by_noise(term.when.gate)) else []),
            f"  student          {_shape(grids.student)}, "
            f"{tapped.get(str(term.block), f'after block {term.block}')}",
            f"  target           {_shape(grids.target)}, {target}",
            f"  compared on      {_shape(common)}, {math.prod(common.size)} tokens",
            "  frames that each step in time covers",
            f"    student        {_covered(grids.student)}",
            f"    target         {_covered(grids.target)}",
            f"    compared on    {_covered(common)}",
            *([f"  predicted ahead  {_ahead(term, common)}"] if term.ahead else []),
            f"  pixels that each token covers: student {_pixels(grids.student, clip)}, target "
            f"{_pixels(grids.target, clip)}, compared on {_pixels(common, clip)}",
        ]


def inspect(recipe: Recipe, *, device: str | None = None) -> Inspection:
    """Work out shapes and sizes from configuration alone, without loading or writing anything.

    Args:
      recipe: The recipe to inspect.
      device: The device to predict memory for, "cpu" or "cuda", which this machine need not have.
        By default the one that a training would run on.

    Raises:
      UserError: The two sides of a term cannot be compared; the message names both grids. Or the
        tokens cannot be shared as `parallel.context` says.
    """
    contract = check(recipe)
    check_context(recipe)
    shapes = contract.shapes
    stored = [encoder.shape(recipe.data.frames) for encoder in recipe.stored_encoders]
    features = sum(
        math.prod(grid.size) * (grid.width * BYTES_FEATURES + BYTES_SCALE)
        + (0 if grid.saliency is None else math.prod(grid.size) * BYTES_SALIENCY)
        for grid in stored
    )
    moments = math.prod(recipe.backbone.preparing.moments(recipe.data)) * BYTES_MOMENTS
    text = sum(
        tensor.numel() * (BYTES_TEXT if tensor.is_floating_point() else 1)
        for tensor in shapes.text.values()
    )
    image = 0
    if contract.continuation is not None:
        image = sum(tensor.nbytes for tensor in recipe.backbone.image(recipe.data).values())
    trained = shapes.parameters
    if recipe.train.lora is not None:
        trained = recipe.backbone.lora_parameters(recipe.train.lora)
    return Inspection(
        recipe=recipe,
        contract=contract,
        trained_parameters=trained,
        bytes_per_clip=moments + text + image,
        feature_bytes_per_clip=features,
        device=pick_device(device),
    )


def _by_noise(gate: Gate) -> str:
    """Say by what the noise level multiplies each sample's loss; "" if by nothing."""
    if isinstance(gate, str):
        return "" if gate == "none" else "times 1 - sigma^2, the share of signal"
    (first, start), *inner, (last, end) = gate
    middle = [f"{factor:g} at {sigma:g}" for sigma, factor in inner]
    points = [f"times {start:g} up to sigma {first:g}", *middle, f"{end:g} from {last:g} on"]
    return ", ".join([*points, "linear between"])


def _fits(peak: int) -> str:
    """Say which cards have room. A card has up to 7 % more than its name says; what the allocator
    cannot use has to go there."""
    return ", ".join(f"{size} GB: {'yes' if peak <= size * 1e9 else 'no'}" for size in CARDS)


def _times(*sizes: int) -> str:
    return "x".join(map(str, sizes))


def _shape(grid: TokenGrid) -> str:
    return f"{_times(*grid.size)} x {grid.width}"


def _pixels(grid: TokenGrid, clip: ClipSize) -> str:
    _, h, w = grid.size
    return f"{clip.height / h:g}x{clip.width / w:g}"


def _covered(grid: TokenGrid) -> str:
    steps = [grid.frames(step) for step in range(grid.size[0])]
    spans = [f"{s[0]}" if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in steps]
    return " ".join(spans if len(spans) <= 8 else [*spans[:4], "...", spans[-1]])


def _ahead(term: Align, common: TokenGrid) -> str:
    early, late = (
        f"{each.start}-{each.start + each.size[0] * each.stride - 1}"
        for each in (common.steps(0, common.size[0] - term.ahead), common.steps(term.ahead))
    )
    steps = count(term.ahead, "step")
    return f"the target at frames {late} by the student at {early}, {steps} ahead"


def _count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def _size(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} GB"
    return f"{number / 1e6:.2f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"
