"""Checks the shapes of a recipe before any work: what each alignment term compares."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from videorepa.align.terms import Grids, Terms, grids
from videorepa.backbones import BackboneShapes, BackboneSpec
from videorepa.conditioning import frames_of, possible
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.bounds import is_same_rate
from videorepa.settings.sections import Continuation, Validation
from videorepa.tokens import TokenGrid


@dataclass(frozen=True)
class Contract:
    """The shapes of a recipe's clips in its backbone, and of what its terms compare.

    Attributes:
      shapes: The backbone's shapes for the recipe's clips.
      terms: The grids of each alignment term, by its name; shapes only.
      projector_parameters: The number of weights of all projectors.
      continuation: What the model is shown of clips; None if nothing.
      left_out: Before which frame each term compares nothing, by its name and by how many of a
        clip's latents the model is shown.
    """

    shapes: BackboneShapes
    terms: dict[str, Grids]
    projector_parameters: int
    continuation: Continuation | None
    left_out: dict[str, dict[int, int]]


def check(recipe: Recipe) -> Contract:
    """Work out the shapes of a recipe from configuration alone; nothing is loaded or written.

    Raises:
      UserError: Training could not work, for instance because a term's two grids share no frame.
    """
    backbone = recipe.backbone
    shapes = backbone.shapes(recipe.data)
    continuation = backbone.continuation(recipe.data)
    if recipe.validation is not None:
        _check_images(recipe.validation, backbone)
    backbone.check_generation(recipe.generation)
    backbone.check_batch(recipe.optim.batch_size)
    check_rate(recipe)
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
    with torch.device("meta"):
        terms = Terms(recipe, shapes)
    left_out = _left_out(recipe, terms, continuation)
    _check_losses(terms, compared, left_out)
    parameters = sum(p.numel() for p in terms.parameters())
    return Contract(shapes, compared, parameters, continuation, left_out)


def check_rate(recipe: Recipe) -> None:
    """Check that clips show the rate that the model is told. Raises UserError."""
    fps, told = recipe.data.fps, recipe.backbone.told_fps
    if fps and told and not is_same_rate(fps, told):
        raise UserError(
            f"data.fps is {fps:g}, and backbone.frame_rate tells the model that clips show "
            f"{told:g} frames per second. Make the two equal."
        )


def _check_images(validation: Validation, backbone: BackboneSpec) -> None:
    """Check that validation's prompts have images where the model continues one, and only there."""
    if validation.prompts and not validation.images:
        backbone.check_text_mode("`validation`", "name one for each prompt in `validation.images`")
    if validation.images and backbone.conditioning() is None:
        raise UserError(
            f"The recipe has validation.images, and {backbone.weights} takes text alone. Leave "
            "them out, or take a model that continues an image; docs/first-frame.md lists them."
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


def _left_out(
    recipe: Recipe, terms: Terms, continuation: Continuation | None
) -> dict[str, dict[int, int]]:
    stride = recipe.backbone.geometry().frames
    left_out = {}
    for name, (_, term) in zip(recipe.terms, terms.named(), strict=True):
        cuts = {n: term.left_out(frames_of(n, stride)) for n in possible(continuation)}
        if term.align.centre == "clips" and len(set(cuts.values())) > 1:
            raise UserError(
                f"The alignment {name} has centre: clips, a mean over the batch, whose clips would "
                "be compared on different frames: data.condition shows "
                f"{' or '.join(map(str, cuts))} of their latents. Show all of them alike, or take "
                "another `centre`."
            )
        left_out[name] = cuts
    return left_out


def _check_losses(
    terms: Terms, compared: dict[str, Grids], left_out: dict[str, dict[int, int]]
) -> None:
    """A projector or loss that would raise in training raises here."""
    for (_, term), (name, shape) in zip(terms.named(), compared.items(), strict=True):
        for latents, frame in left_out[name].items():
            try:
                sides = term.sides(shape.student, shape.target, frame)
                term.align.loss(*(term.centred(_thin(side)) for side in sides))
            except UserError as error:
                if not frame:
                    raise
                raise UserError(
                    f"The alignment {name} cannot leave out the first {latents} of a clip's "
                    f"latents, which data.condition shows to the model: {error}"
                ) from None


def _thin(grid: TokenGrid) -> TokenGrid:
    """Make a grid of zeros with the same steps in time and one token a frame."""
    steps = grid.size[0]
    saliency = None if grid.saliency is None else torch.zeros(1, steps, 1, 1)
    return replace(grid, tokens=torch.zeros(1, steps, 1, 1, grid.width), saliency=saliency)
