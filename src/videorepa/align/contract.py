"""Checks the shapes of a recipe before any work: what each alignment term compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from videorepa.align.terms import Grids, Terms, grids
from videorepa.backbones import BackboneShapes
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.bounds import is_same_rate
from videorepa.tokens import TokenGrid


@dataclass(frozen=True)
class Contract:
    """The shapes of a recipe's clips in its backbone, and of what its terms compare.

    Attributes:
      shapes: The backbone's shapes for the recipe's clips.
      terms: The grids of each alignment term, by its name; shapes only.
      projector_parameters: The number of weights of all projectors.
    """

    shapes: BackboneShapes
    terms: dict[str, Grids]
    projector_parameters: int


def check(recipe: Recipe) -> Contract:
    """Work out the shapes of a recipe from configuration alone; nothing is loaded or written.

    Raises:
      UserError: Training could not work, for instance because a term's two grids share no frame.
    """
    backbone = recipe.backbone
    shapes = backbone.shapes(recipe.data)
    backbone.check_generation(recipe.generation)
    fps, told = recipe.data.fps, backbone.told_fps
    if fps and told and not is_same_rate(fps, told):
        raise UserError(
            f"data.fps is {fps:g}, and backbone.frame_rate tells the model that clips show "
            f"{told:g} frames per second. Make the two equal."
        )
    if backbone.prepared_with is not None:
        _check_prepared(recipe, shapes)
    for name, term in recipe.terms.items():
        if term.encoder is not None:
            term.encoder.check_sees(has_scenes=recipe.data.lab is not None)
        for side in (term.block, term.target):
            if isinstance(side, int) and side > shapes.blocks:
                raise UserError(
                    f"The alignment {name} taps block {side}, counted from 1; "
                    f"{backbone.weights} has {shapes.blocks} blocks."
                )
    compared = {
        name: grids(term, shapes, recipe.data.frames) for name, term in recipe.terms.items()
    }
    return Contract(shapes, compared, _projector_parameters(recipe, shapes, compared))


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


def _projector_parameters(
    recipe: Recipe, shapes: BackboneShapes, compared: dict[str, Grids]
) -> int:
    with torch.device("meta"):
        terms = Terms(recipe, shapes)
    for (_, term), shape in zip(terms.named(), compared.values(), strict=True):
        # A projector or loss that would raise in training raises here.
        sides = term.sides(shape.student, shape.target)
        term.align.loss(*(term.centred(_thin(side)) for side in sides))
    return sum(p.numel() for p in terms.parameters())


def _thin(grid: TokenGrid) -> TokenGrid:
    """Make a grid of zeros with the same steps in time and one token a frame."""
    steps = grid.size[0]
    saliency = None if grid.saliency is None else torch.zeros(1, steps, 1, 1)
    return replace(grid, tokens=torch.zeros(1, steps, 1, 1, grid.width), saliency=saliency)
