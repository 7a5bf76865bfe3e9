"""A dry look at a recipe: shapes, parameters and disk, before a single weight is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from videorepa.align import Projector
from videorepa.errors import UserError
from videorepa.recipe import Align, Recipe
from videorepa.tokens import TokenGrid

BYTES_MOMENTS, BYTES_TEXT, BYTES_FEATURES = 2, 2, 2


@dataclass(frozen=True)
class Inspection:
    """What a recipe comes to. Byte counts are of one clip in the cache.

    student: the tapped block's grid. kept: without the steps that the teacher does not see.
    teacher: the teacher's grid. All three hold shapes only.
    """

    recipe: Recipe
    latents: tuple[int, int, int, int]
    student: TokenGrid
    kept: TokenGrid | None
    teacher: TokenGrid | None
    blocks: int
    transformer_parameters: int
    trained_parameters: int
    projector_parameters: int
    bytes_per_clip: int
    feature_bytes_per_clip: int

    def __str__(self) -> str:
        recipe, size = self.recipe, self.recipe.data
        frames, channels, height, width = self.latents
        t, h, w = self.student.size
        lines = [
            f"{recipe.name}: {recipe.backbone.name} from {recipe.backbone.weights}",
            "",
            "student",
            f"  clip             {size.frames}x{size.height}x{size.width} RGB",
            f"  latents          {frames}x{height}x{width} x {channels}",
            f"  block output     {t}x{h}x{w} x {self.student.width}, after block "
            + (f"{recipe.align.block} of {self.blocks}" if recipe.align else f"1..{self.blocks}"),
        ]
        if self.teacher is not None and self.kept is not None and recipe.encoder is not None:
            encoder = recipe.encoder
            kt, kh, kw = self.kept.size
            et, eh, ew = self.teacher.size
            lines += [
                f"  seen by teacher  {kt}x{kh}x{kw}",
                f"  on its grid      {et}x{eh}x{ew} x {self.teacher.width}",
                "",
                "teacher",
                f"  clip             {encoder.frames}x{encoder.height}x{encoder.width}, frames "
                f"{self.teacher.start}..{self.teacher.start + encoder.frames - 1}",
                f"  tokens           {et}x{eh}x{ew} x {self.teacher.width}",
                "",
                "frames that each step in time covers",
                f"  student          {_covered(self.student)}",
                f"  teacher          {_covered(self.teacher)}",
                f"pixels that each token covers: student {size.height // h}x{size.width // w}, "
                f"teacher {size.height / eh:g}x{size.width / ew:g}",
            ]
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
        return "\n".join(lines)


def inspect(recipe: Recipe) -> Inspection:
    """Work out shapes and sizes from configuration alone; nothing is loaded or written.

    Raises UserError, naming both grids, if student and teacher cannot meet.
    """
    shapes = recipe.backbone.shapes(recipe.data)
    recipe.backbone.check_generation(recipe.generation)
    kept = teacher = None
    projector = features = 0
    if recipe.alignment is not None:
        align, encoder = recipe.alignment
        if align.block > shapes.blocks:
            raise UserError(
                f"align.block is {align.block}, counted from 1; {recipe.backbone.weights} "
                f"has {shapes.blocks} blocks."
            )
        teacher = encoder.shape(recipe.data.frames)
        kept = shapes.grid.since(teacher.start)
        projector = _parameters_of_projector(align, kept, teacher)
        if recipe.stores_features:
            features = teacher.tokens.numel() * BYTES_FEATURES
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
        kept=kept,
        teacher=teacher,
        blocks=shapes.blocks,
        transformer_parameters=shapes.parameters,
        trained_parameters=trained,
        projector_parameters=projector,
        bytes_per_clip=moments + text,
        feature_bytes_per_clip=features,
    )


def _parameters_of_projector(align: Align, student: TokenGrid, teacher: TokenGrid) -> int:
    import torch

    with torch.device("meta"):
        projector = Projector.between(student, teacher, align.hidden)
        # Also proves that the grids meet: the projector is run on shapes.
        met = projector(student, like=teacher)
    assert met.tokens.shape[1:] == teacher.tokens.shape[1:]
    return sum(p.numel() for p in projector.parameters())


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
    return f"{count / 1e6:.2f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"
