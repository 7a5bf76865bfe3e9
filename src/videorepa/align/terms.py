"""The alignment terms of a training: what each compares, with which projector, and when."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from videorepa.align.gathering import Gathering
from videorepa.align.gradients import Aligned, Junction, TermResult
from videorepa.align.projector import projector_between
from videorepa.align.resampling import centred_similarity, common_grid, resample
from videorepa.align.taps import Tapped, tap
from videorepa.backbones import Backbone, BackboneShapes
from videorepa.conditioning import Opening
from videorepa.diffusion import Denoised
from videorepa.encoders import EncoderSpec
from videorepa.errors import UserError
from videorepa.recipe import Align, Recipe
from videorepa.settings.sections import Gate
from videorepa.tokens import TokenGrid


class Grids(NamedTuple):
    """The grids of a term's two sides, and the common grid on which they are compared."""

    student: TokenGrid
    target: TokenGrid
    common: TokenGrid


class Sides(NamedTuple):
    """The two sides of a term as its loss gets them."""

    student: TokenGrid
    target: TokenGrid


def grids(term: Align, shapes: BackboneShapes, frames: int) -> Grids:
    """Work out the grids of a recipe's term without loading anything.

    Args:
      term: The term's section of the recipe.
      shapes: The backbone's shapes for the recipe's clips.
      frames: Frames of a clip.

    Raises:
      UserError: The two sides share no frame; the message names both grids.
    """
    latents = torch.empty(1, *shapes.latents, device="meta").permute(0, 1, 3, 4, 2)
    latent_grid = TokenGrid.causal(latents, frames, shapes.latent_frames)
    student = latent_grid if term.block == "clean" else shapes.grid
    if term.encoder is not None:
        target = term.encoder.shape(frames)
    else:
        target = latent_grid if term.target == "latents" else shapes.grid
    common = common_grid(student, target, term.interpolate)
    left = common.size[0] - term.ahead
    if left < 1:
        raise UserError(
            f"align.ahead is {term.ahead}, and the two sides are compared on {common}: that many "
            f"steps ahead there is none. Give {common.size[0] - 1} or less."
        )
    if term.centre == "time" and left < 2:
        raise UserError(
            "align.centre: time compares what changes, and the two sides are compared on "
            f"{common}, which has one step in time"
            + (f" with another {term.ahead} ahead" if term.ahead else "")
            + ". Give both more frames, or another `centre`."
        )
    return Grids(student, target, common)


class Term(nn.Module):
    """One alignment term: its projector, its weight over the steps, and its rule to stop.

    Attributes:
      align: The term's section of the recipe.
      common: The grid on which the two sides are compared.
      projector: Brings the student to the common grid.
      cosines: Cosines of the term's gradient and the denoising loss's, over the latest steps.
      stopped: Whether the rule to stop has ended the term.
    """

    def __init__(self, align: Align, shape: Grids) -> None:
        super().__init__()
        self.align, self.common = align, shape.common
        self.projector = projector_between(
            align.projector, shape.student, shape.common, align.hidden
        )
        self.cosines: deque[float] = deque(maxlen=align.when.opposed)
        self.stopped = False

    def weight(self, step: int) -> float:
        """The coefficient at a step; 0 throughout for a probe."""
        return 0.0 if self.stopped else self.align.weight * self.align.when.share(step)

    def runs(self, step: int) -> bool:
        """Whether the term is computed at a step: while its weight is positive; probes always."""
        return self.align.is_probe or self.weight(step) > 0

    def forward(
        self,
        student: TokenGrid,
        target: TokenGrid,
        sigma: Float[Tensor, " b"],
        shown: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """The unweighted loss, and the mean-centred similarity of the two sides.

        Args:
          student: The student's grid as tapped.
          target: The other side's grid.
          sigma: The noise level of each sample, 0 to 1.
          shown: How many first frames of each clip the model was shown; by default none of any.
            What covers them is left out of both sides.
        """
        alike: dict[int, list[int]] = defaultdict(list)
        for index, frames in enumerate(shown or [0]):
            alike[self.left_out(frames)].append(index)
        if len(alike) == 1:
            return self._compared(student, target, sigma, *alike)
        # Each clip's loss is over what is left of it, and the batch's is the mean over clips.
        loss, similarity = sigma.new_zeros(()), sigma.new_zeros(())
        for frames, some in alike.items():
            parts = self._compared(student.samples(some), target.samples(some), sigma[some], frames)
            share = len(some) / len(sigma)
            loss, similarity = loss + share * parts[0], similarity + share * parts[1]
        return loss, similarity

    def left_out(self, shown: int) -> int:
        """Before which frame the term compares nothing, for a model that was shown the first
        `shown` frames; 0 if that leaves out nothing that it would compare."""
        return shown if shown > max(self.common.start, 0) else 0

    def _compared(
        self, student: TokenGrid, target: TokenGrid, sigma: Float[Tensor, " b"], left_out: int
    ) -> tuple[Tensor, Tensor]:
        if self.align.standardise is not None:
            target = target.standardised(self.align.standardise)
        sides = self.sides(student, target, left_out)
        projected, target = (self.centred(side) for side in sides)
        return self._loss(projected, target, sigma), centred_similarity(projected, target)

    def sides(self, student: TokenGrid, target: TokenGrid, left_out: int = 0) -> Sides:
        """Bring both sides to the common grid: to all its steps, or with `ahead` the student to the
        early ones and the target to as many later ones.

        Args:
          student: The student's grid.
          target: The other side's grid.
          left_out: Before which frame the student is not compared.

        Raises:
          UserError: The student has no step that is over with the early ones, or none is left.
        """
        ahead = self.align.ahead
        early = self.common.steps(0, self.common.size[0] - ahead)
        # Interpolation must not mix in the steps that are left out, or those that are predicted.
        if left_out:
            student = student.since(left_out)
        if ahead:
            student = student.since(early.start).until(early.start + early.size[0] * early.stride)
        projected, target = self.projector(student, early), resample(target, self.common)
        first = early.size[0] - early.since(left_out).size[0] if left_out else 0
        return Sides(projected.steps(first), target.steps(first + ahead))

    def centred(self, grid: TokenGrid) -> TokenGrid:
        """A side's grid with means subtracted as the recipe's `centre` asks."""
        if self.align.centre == "clips":
            return grid.centred()
        return grid.changes() if self.align.centre == "time" else grid

    def _loss(self, student: TokenGrid, target: TokenGrid, sigma: Float[Tensor, " b"]) -> Tensor:
        if self.align.when.gate == "none":
            return self.align.loss(student, target)
        # A loss is a mean over samples, so it can be computed sample by sample.
        losses = [
            self.align.loss(student.sample(index), target.sample(index))
            for index in range(len(sigma))
        ]
        return (_factors(self.align.when.gate, sigma) * torch.stack(losses)).mean()

    def watch(self, cosine: float) -> None:
        """Record the cosine of a step's two gradients; stop the term if their mean is negative."""
        if self.align.when.opposed is None:
            return
        self.cosines.append(cosine)
        is_full = len(self.cosines) == self.cosines.maxlen
        self.stopped = self.stopped or (is_full and sum(self.cosines) < 0)


def _factors(gate: Gate, sigma: Float[Tensor, " b"]) -> Tensor:
    """The factor of each sample's loss at its noise level. It does not wait for the device."""
    if isinstance(gate, str):
        return 1 - sigma**2
    factors = torch.full_like(sigma, gate[0][1])
    for (low, at_low), (high, at_high) in pairwise(gate):
        share = ((sigma - low) / (high - low)).clamp(max=1)
        factors = torch.where(sigma > low, at_low + (at_high - at_low) * share, factors)
    return factors


class Terms(nn.Module):
    """All alignment terms of a recipe; without any, training is plain fine-tuning.

    A term of weight 0 is a probe: its projector learns on tokens that are cut off from the
    transformer. With a probe, the alignment of plain fine-tuning is measured in the same way as
    that of an aligned run.

    Args:
      recipe: Names the terms.
      shapes: The backbone's shapes for the recipe's clips.

    Attributes:
      gathering: The processes that share the tokens of the tapped blocks.
    """

    def __init__(self, recipe: Recipe, shapes: BackboneShapes) -> None:
        super().__init__()
        self.names = list(recipe.terms)
        self.each = nn.ModuleList(
            Term(align, grids(align, shapes, recipe.data.frames)) for align in recipe.terms.values()
        )
        self.gathering = Gathering()
        self._taps: dict[int, Tapped] = {}

    def named(self) -> Iterator[tuple[str, Term]]:
        """Give each term with the suffix of its logged values: "" for one term, else ".name"."""
        for name, term in zip(self.names, self.each, strict=True):
            assert isinstance(term, Term)
            yield ("" if len(self.names) == 1 else f".{name}"), term

    @property
    def blocks(self) -> set[int]:
        """The numbers of the blocks that the terms compare, from 1."""
        sides = (side for _, term in self.named() for side in (term.align.block, term.align.target))
        return {side for side in sides if isinstance(side, int)}

    @contextmanager
    def tapped(self, backbone: Backbone) -> Iterator[None]:
        """Keep the outputs of the blocks that the terms compare, while the context is open."""
        with ExitStack() as stack:
            self._taps = {
                number: stack.enter_context(tap(backbone.block(number)))
                for number in sorted(self.blocks)
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
        opening: Opening | None = None,
    ) -> Aligned:
        """Compute the terms for the batch that was just denoised.

        Args:
          step: The training step, from 0.
          backbone: The model whose blocks are tapped.
          latents: The clips' latents.
          denoised: The transformer's prediction for them.
          teachers: The clips' features by their encoder.
          frames: Frames of a clip.
          opening: What the model was shown of the clips.
        """
        shown = opening and opening.frames(backbone.geometry.frames)
        outputs: dict[Any, Any] = {number: tapped.take() for number, tapped in self._taps.items()}
        outputs |= {"clean": denoised.clean, "latents": latents}

        def grid(side: Any, output: Any) -> TokenGrid:
            if isinstance(side, int):
                return backbone.grid(output, latents)
            stride = backbone.geometry.frames
            return TokenGrid.causal(output.permute(0, 1, 3, 4, 2), frames, stride)

        def junction(side: Any) -> Junction:
            if side == "clean":
                return Junction(denoised.clean, Gathering(), denoised.source, denoised.slope)
            # Of tapped tokens each process can have a part; latents are whole.
            return Junction(outputs[side], self.gathering)

        running = [(suffix, term) for suffix, term in self.named() if term.runs(step)]
        read = dict.fromkeys(term.align.block for _, term in running)
        junctions = {side: junction(side) for side in read}
        results = []
        for suffix, term in running:
            align = term.align
            branch, gradients = junctions[align.block].branch(align.is_probe)
            student = grid(align.block, branch)
            if align.encoder is not None:
                target = teachers[align.encoder]
            else:
                output = outputs[align.target]
                if isinstance(align.target, int):
                    output = self.gathering.whole(output)
                target = grid(align.target, output).detach()
            loss, similarity = term(student, target, denoised.sigma, shown)
            results.append(TermResult(suffix, term.weight(step), loss, similarity, gradients))
        return Aligned(results)

    def watch(self, values: Mapping[str, float]) -> None:
        """Pass a step's logged values to the terms' rules to stop."""
        for suffix, term in self.named():
            if (cosine := values.get(f"grad_cosine{suffix}")) is not None:
                term.watch(cosine)

    def clipped(self) -> tuple[list[nn.Parameter], list[list[nn.Parameter]]]:
        """Give the parameters to clip with the transformer's, and each probe's to clip alone.

        A probe's gradients must not change how much the transformer's are scaled.
        """
        together, apart = [], []
        for _, term in self.named():
            parameters = list(term.parameters())
            if term.align.is_probe:
                apart.append(parameters)
            else:
                together += parameters
        return together, apart

    def stopping_state(self) -> list[dict[str, Any]]:
        """Give the state of the rules to stop, as plain values, for a checkpoint."""
        return [
            {"cosines": list(term.cosines), "stopped": term.stopped} for _, term in self.named()
        ]

    def load_stopping_state(self, states: list[dict[str, Any]]) -> None:
        """Restore a state that `stopping_state` gave."""
        for (_, term), state in zip(self.named(), states, strict=True):
            term.cosines.extend(state["cosines"])
            term.stopped = state["stopped"]
