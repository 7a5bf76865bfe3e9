"""A dry look at a recipe: shapes, parameters and disk, before a single weight is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from videorepa.align.resampling import resample
from videorepa.align.terms import Grids, Terms, grids
from videorepa.backbones import BackboneShapes
from videorepa.data.source import open_source
from videorepa.errors import UserError
from videorepa.recipe import Align, Recipe
from videorepa.settings.sections import ClipSize
from videorepa.system.device import pick_device
from videorepa.tokens import TokenGrid
from videorepa.training.cost import Cost, predict

BYTES_MOMENTS, BYTES_TEXT, BYTES_FEATURES, BYTES_SCALE, BYTES_SALIENCY = 2, 2, 1, 4, 2


@dataclass(frozen=True)
class Inspection:
    """What a recipe comes to. Byte counts are of one clip in the cache.

    student: a block's grid. terms: what each alignment term compares; shapes only.
    device: what the training's cost is predicted for.
    """

    recipe: Recipe
    latents: tuple[int, int, int, int]
    student: TokenGrid
    terms: dict[str, Grids]
    blocks: int
    transformer_parameters: int
    trained_parameters: int
    projector_parameters: int
    bytes_per_clip: int
    feature_bytes_per_clip: int
    device: torch.device

    @cached_property
    def cost(self) -> Cost:
        """Peak memory and operations of a step; worked out when first asked for."""
        return predict(self.recipe, self.device)

    @cached_property
    def clips(self) -> int | None:
        """How many clips the recipe trains on, or None where their list is not at hand."""
        if self.recipe.data.lab is not None:
            return self.recipe.data.lab.clips
        try:
            return len(open_source(self.recipe.data).items)
        except UserError:
            return None

    def __str__(self) -> str:
        recipe, size = self.recipe, self.recipe.data
        frames, channels, height, width = self.latents
        lines = [
            f"{recipe.name}: {recipe.backbone.name} from {recipe.backbone.weights}",
            "",
            "student",
            f"  clip             {size.frames}x{size.height}x{size.width} RGB",
            f"  latents          {frames}x{height}x{width} x {channels}",
            f"  block output     {_shape(self.student)}, after each of {self.blocks} blocks",
        ]
        for name, term in recipe.terms.items():
            lines += ["", f"alignment: {name}", *self._term(term, self.terms[name])]
        lines += [
            "",
            "parameters",
            f"  transformer      {_count(self.transformer_parameters)}",
            f"  trained          {_count(self.trained_parameters)}"
            + ("" if recipe.train.lora is None else f" (LoRA, rank {recipe.train.lora.rank})"),
            f"  projector        {_count(self.projector_parameters)}, left behind at export",
            "",
            "cache, per clip",
            f"  latents and text {_size(self.bytes_per_clip)}",
            f"  features         {_size(self.feature_bytes_per_clip)}",
        ]
        if self.clips is not None:
            whole = self.clips * (self.bytes_per_clip + self.feature_bytes_per_clip)
            lines += [f"  all {self.clips:<12} {_size(whole)}"]
        return "\n".join([*lines, *self._cost()])

    def _cost(self) -> list[str]:
        cost, optim = self.cost, self.recipe.optim
        dtype = str(cost.dtype).removeprefix("torch.")
        return [
            "",
            f"peak memory, on one {cost.device.type} in {dtype}",
            *(f"  {part:<16} {_size(size)}" for part, size in cost.parts.items()),
            f"  together         {_size(sum(cost.parts.values()))}",
            *([f"  while loading    {_size(cost.loading)}"] if cost.loading else []),
            "",
            f"operations, per step of {optim.batch_size * optim.accumulate} clips",
            f"  floating-point   {cost.operations / 1e12:.3g} trillion",
        ]

    def _term(self, term: Align, grids: Grids) -> list[str]:
        clip, met = self.recipe.data, grids.met
        tapped = {"clean": "predicted latents", "latents": "the clip's latents"}
        target = tapped.get(str(term.target), f"block {term.target}")
        if term.encoder is not None:
            seen = term.encoder
            whole, piece = (seen.frames, seen.height, seen.width), seen.piece
            target = f"{seen.name}, fed {whole[0]}x{whole[1]}x{whole[2]}"
            if piece != whole:
                target += f" in pieces of {piece[0]}x{piece[1]}x{piece[2]}"
        options = term.loss.model_dump(exclude={"name"})
        said = ", ".join(f"{key} {value}" for key, value in options.items())
        weight = f"{term.weight:g}" + (", measured only" if term.is_probe else "")
        return [
            f"  loss             {term.loss.name}" + (f" ({said})" if said else ""),
            f"  weight           {weight}",
            f"  student          {_shape(grids.student)}, "
            f"{tapped.get(str(term.block), f'after block {term.block}')}",
            f"  target           {_shape(grids.target)}, {target}",
            f"  compared on      {_shape(met)}, {math.prod(met.size)} tokens",
            "  frames that each step in time covers",
            f"    student        {_covered(grids.student)}",
            f"    target         {_covered(grids.target)}",
            f"    compared on    {_covered(met)}",
            f"  pixels that each token covers: student {_pixels(grids.student, clip)}, target "
            f"{_pixels(grids.target, clip)}, compared on {_pixels(met, clip)}",
        ]


def inspect(recipe: Recipe, *, device: str | None = None) -> Inspection:
    """Work out shapes and sizes from configuration alone; nothing is loaded or written.

    device: what memory is predicted for, "cpu" or "cuda"; it need not be here. By default the one
        that a training would run on.
    Raises UserError, naming both grids, if a term's two sides cannot meet.
    """
    shapes = recipe.backbone.shapes(recipe.data)
    recipe.backbone.check_generation(recipe.generation)
    if recipe.backbone.prepared_with is not None:
        _check_prepared(recipe, shapes)
    for name, term in recipe.terms.items():
        for side in (term.block, term.target):
            if isinstance(side, int) and side > shapes.blocks:
                raise UserError(
                    f"The alignment {name} taps block {side}, counted from 1; "
                    f"{recipe.backbone.weights} has {shapes.blocks} blocks."
                )
    found = {name: grids(term, shapes, recipe.data.frames) for name, term in recipe.terms.items()}
    stored = [encoder.shape(recipe.data.frames) for encoder in recipe.stored_encoders]
    features = sum(
        math.prod(grid.size) * (grid.width * BYTES_FEATURES + BYTES_SCALE)
        + (0 if grid.saliency is None else math.prod(grid.size) * BYTES_SALIENCY)
        for grid in stored
    )
    moments = 2 * math.prod(shapes.latents) * BYTES_MOMENTS
    text = sum(
        tensor.numel() * (BYTES_TEXT if tensor.is_floating_point() else 1)
        for tensor in shapes.text.values()
    )
    trained = shapes.parameters
    if recipe.train.lora is not None:
        trained = recipe.backbone.lora_parameters(recipe.train.lora)
    return Inspection(
        recipe=recipe,
        latents=shapes.latents,
        student=shapes.grid,
        terms=found,
        blocks=shapes.blocks,
        transformer_parameters=shapes.parameters,
        trained_parameters=trained,
        projector_parameters=_projector_parameters(recipe, shapes, found),
        bytes_per_clip=moments + text,
        feature_bytes_per_clip=features,
        device=pick_device(device),
    )


def _check_prepared(recipe: Recipe, shapes: BackboneShapes) -> None:
    prepared = recipe.backbone.preparing.shapes(recipe.data)
    theirs, ours = (
        ", ".join("x".join(map(str, size)) for size in (s.latents, *(t.shape for t in texts)))
        for s, texts in ((prepared, prepared.text.values()), (shapes, shapes.text.values()))
    )
    if theirs != ours:
        raise UserError(
            f"backbone.prepared_with is {recipe.backbone.prepared_with}, whose latents and text "
            f"are {theirs}; {recipe.backbone.weights} takes {ours}. Leave it out."
        )


def _projector_parameters(recipe: Recipe, shapes: BackboneShapes, found: dict[str, Grids]) -> int:
    with torch.device("meta"):
        terms = Terms(recipe, shapes)
    for (_, term), shape in zip(terms.named(), found.values(), strict=True):
        # What projector or loss would refuse in training is refused here, on a frame of one token.
        projected = term.projector(shape.student, like=shape.met)
        sides = (projected, resample(shape.target, like=shape.met))
        term.align.loss(*(term.centred(_thin(side)) for side in sides))
    return sum(p.numel() for p in terms.parameters())


def _thin(grid: TokenGrid) -> TokenGrid:
    steps = grid.size[0]
    saliency = None if grid.saliency is None else torch.zeros(1, steps, 1, 1)
    return replace(grid, tokens=torch.zeros(1, steps, 1, 1, grid.width), saliency=saliency)


def _shape(grid: TokenGrid) -> str:
    t, h, w = grid.size
    return f"{t}x{h}x{w} x {grid.width}"


def _pixels(grid: TokenGrid, clip: ClipSize) -> str:
    _, h, w = grid.size
    return f"{clip.height / h:g}x{clip.width / w:g}"


def _covered(grid: TokenGrid) -> str:
    spans = [grid.frames(step) for step in range(grid.size[0])]
    said = [f"{s[0]}" if len(s) == 1 else f"{s[0]}-{s[-1]}" for s in spans]
    return " ".join(said) if len(said) <= 8 else " ".join([*said[:4], "...", said[-1]])


def _count(number: int) -> str:
    for unit, name in ((1e9, "billion"), (1e6, "million"), (1e3, "thousand")):
        if number >= unit:
            return f"{number / unit:.2f} {name}"
    return str(number)


def _size(count: int) -> str:
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
