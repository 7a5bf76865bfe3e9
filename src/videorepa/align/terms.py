"""The alignment terms of a training, live: what each taps, its projector, and when it counts."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.align.gradients import Aligned, Gradients, Part
from videorepa.align.projector import projector_between
from videorepa.align.resampling import centred_similarity, common_grid, resample
from videorepa.align.taps import Tapped, tap
from videorepa.backbones import Backbone, BackboneShapes
from videorepa.diffusion import Denoised
from videorepa.encoders import EncoderSpec
from videorepa.errors import UserError
from videorepa.recipe import Align, Recipe
from videorepa.tokens import TokenGrid


class Grids(NamedTuple):
    """The shapes of a term: both sides, and the grid on which they meet."""

    student: TokenGrid
    target: TokenGrid
    met: TokenGrid


def grids(term: Align, shapes: BackboneShapes, frames: int) -> Grids:
    """What a term of a recipe compares, for clips of so many frames, without loading anything.

    Raises UserError, with both grids, if they cannot meet.
    """
    latents = torch.empty(1, *shapes.latents, device="meta").permute(0, 1, 3, 4, 2)
    of_latents = TokenGrid.causal(latents, frames)
    student = of_latents if term.block == "clean" else shapes.grid
    if term.encoder is not None:
        target = term.encoder.shape(frames)
    else:
        target = of_latents if term.target == "latents" else shapes.grid
    met = common_grid(student, target, term.interpolate)
    if term.centre == "time" and met.size[0] < 2:
        raise UserError(
            f"align.centre: time compares what changes, and the two sides meet on {met}, which has "
            "one step in time. Give both more frames, or another `centre`."
        )
    return Grids(student, target, met)


class Term(nn.Module):
    """One alignment term with its projector and, where it has a rule to stop, its memory."""

    def __init__(self, align: Align, shape: Grids) -> None:
        super().__init__()
        self.align, self.met = align, shape.met
        self.projector = projector_between(align.projector, shape.student, shape.met, align.hidden)
        self.cosines: deque[float] = deque(maxlen=align.when.opposed)
        self.stopped = False

    def weight(self, step: int) -> float:
        """The coefficient at a step; a probe's is 0 throughout."""
        return 0.0 if self.stopped else self.align.weight * self.align.when.share(step)

    def runs(self, step: int) -> bool:
        """Whether the term is computed at a step: while it counts, and a probe always."""
        return self.align.is_probe or self.weight(step) > 0

    def forward(
        self, student: TokenGrid, target: TokenGrid, sigma: Float[Tensor, " b"]
    ) -> tuple[Tensor, Tensor]:
        """The unweighted loss, and the mean-centred similarity of the two sides."""
        if self.align.standardise is not None:
            target = target.standardised(self.align.standardise)
        ours = self.centred(self.projector(student, like=self.met))
        theirs = self.centred(resample(target, like=self.met))
        return self._loss(ours, theirs, sigma), centred_similarity(ours, theirs)

    def centred(self, grid: TokenGrid) -> TokenGrid:
        """A side's grid as the loss sees it."""
        if self.align.centre == "clips":
            return grid.centred()
        return grid.changes() if self.align.centre == "time" else grid

    def _loss(self, ours: TokenGrid, theirs: TokenGrid, sigma: Float[Tensor, " b"]) -> Tensor:
        if self.align.when.gate == "none":
            return self.align.loss(ours, theirs)
        # A loss is a mean over samples, so that it can be asked for one by one.
        each = [
            self.align.loss(ours.sample(index), theirs.sample(index)) for index in range(len(sigma))
        ]
        return ((1 - sigma**2) * torch.stack(each)).mean()

    def watch(self, cosine: float) -> None:
        """Note how the step's two gradients lay to each other, and stop if they are opposed."""
        if self.align.when.opposed is None:
            return
        self.cosines.append(cosine)
        is_full = len(self.cosines) == self.cosines.maxlen
        self.stopped = self.stopped or (is_full and sum(self.cosines) < 0)


class Terms(nn.Module):
    """All alignment terms of a recipe; none is a training without alignment.

    At weight 0 a projector still learns, on tokens cut off from the transformer: so the control is
    plain fine-tuning, and its alignment is measured as fairly as the aligned run's.
    """

    def __init__(self, recipe: Recipe, shapes: BackboneShapes) -> None:
        super().__init__()
        self.names = list(recipe.terms)
        self.each = nn.ModuleList(
            Term(align, grids(align, shapes, recipe.data.frames)) for align in recipe.terms.values()
        )
        self._taps: dict[int, Tapped] = {}

    def named(self) -> Iterator[tuple[str, Term]]:
        """The terms, with what is added to their names in the log: nothing where there is one."""
        for name, term in zip(self.names, self.each, strict=True):
            assert isinstance(term, Term)
            yield ("" if len(self.names) == 1 else f".{name}"), term

    @contextmanager
    def tapped(self, backbone: Backbone) -> Iterator[None]:
        """Keep the outputs of all blocks that the terms compare, for as long as it lasts."""
        sides = {side for _, term in self.named() for side in (term.align.block, term.align.target)}
        with ExitStack() as stack:
            self._taps = {
                side: stack.enter_context(tap(backbone.block(side)))
                for side in sorted(side for side in sides if isinstance(side, int))
            }
            yield

    def forward(
        self,
        step: int,
        backbone: Backbone,
        latents: Float[Tensor, "b f c h w"],
        denoised: Denoised,
        teachers: Mapping[EncoderSpec, TokenGrid],
        frames: int,
    ) -> Aligned:
        """The terms of the batch that was just denoised.

        teachers: the clips' features by each encoder. frames: of a clip.
        """
        outputs: dict[Any, Any] = {side: tapped.take() for side, tapped in self._taps.items()}
        outputs |= {"clean": denoised.clean, "latents": latents}

        def grid(side: Any, output: Any) -> TokenGrid:
            if isinstance(side, int):
                return backbone.grid(output, latents)
            return TokenGrid.causal(output.permute(0, 1, 3, 4, 2), frames)

        parts = []
        for suffix, term in self.named():
            if not term.runs(step):
                continue
            align = term.align
            gradients = Gradients(outputs[align.block], detach=align.is_probe)
            student = grid(align.block, gradients.branch)
            if align.encoder is not None:
                target = teachers[align.encoder]
            else:
                target = grid(align.target, outputs[align.target]).detach()
            loss, similarity = term(student, target, denoised.sigma)
            parts.append(Part(suffix, term.weight(step), loss, similarity, gradients))
        return Aligned(parts)

    def watch(self, values: Mapping[str, float]) -> None:
        """Let the terms' stop rules see what was logged of a step."""
        for suffix, term in self.named():
            if (cosine := values.get(f"grad_cosine{suffix}")) is not None:
                term.watch(cosine)

    def clipped(self) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
        """The parameters whose gradients are clipped with the transformer's, and those, probe by
        probe, that are clipped apart from it: a probe must not take a share."""
        together, apart = [], []
        for _, term in self.named():
            parameters = list(term.parameters())
            if term.align.is_probe:
                apart.append(parameters)
            else:
                together += parameters
        return together, apart

    def memory(self) -> list[dict[str, Any]]:
        """What the stop rules go by, as plain values."""
        return [
            {"cosines": list(term.cosines), "stopped": term.stopped} for _, term in self.named()
        ]

    def remember(self, memory: list[dict[str, Any]]) -> None:
        """Take up what `memory` gave."""
        for (_, term), found in zip(self.named(), memory, strict=True):
            term.cosines.extend(found["cosines"])
            term.stopped = found["stopped"]
