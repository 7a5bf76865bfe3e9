"""Measures how much of the simulator's truth a linear readout finds in a model's blocks.

Run: python experiments/readout.py --models control=RUN aligned=RUN [--out docs/study/readout.csv]

Each token of a block is read by ridge regression fitted to other clips. What is read is the state
of the bodies that the token covers (`encoder: truth`): where they are, how they move, and how near
they are to touching something. R^2 is 1 for what the block holds in full, and 0 for no more than
the mean. The base model comes first, then a random copy of it, then the models. `input` is what
goes into the model: the noisy latents of the token's place.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

from held_out import BATCH, READ, Clips, compared, load_coder, named
from rows import keep
from videorepa.align.resampling import resample
from videorepa.align.taps import tap
from videorepa.backbones import Backbone, timestep_of_noise
from videorepa.encoders.truth import FACTS, TELLS, Truth
from videorepa.lab.study.recipe import SHORT, StudyRecipe
from videorepa.recipe import Recipe
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid
from videorepa.world.simulator import COLOURS

FITTED = 902
"""The series of the clips that readouts are fitted to."""
LEVELS = (0.1, 0.5, 0.9)
BLOCKS = (2, 4, 6)
STRENGTHS = (10.0, 100.0, 1e3, 1e4, 1e5)


class Read(Clips):
    """Clips with the truth on the student's grid."""

    def __init__(self, recipe: Recipe, coder: Backbone, count: int, series: int) -> None:
        super().__init__(recipe, coder, count, series)
        truth, frames = Truth(), recipe.data.frames
        tokens = np.stack([truth.tokens(scene, frames) for scene in self.scenes if scene])
        grid = TokenGrid(torch.from_numpy(tokens), truth.first_frame(frames), truth.tubelet)
        like = recipe.backbone.shapes(recipe.data).grid.since(grid.start)
        self.start = like.start
        self.truth = resample(grid, like).tokens.flatten(0, 3).double()

    @torch.no_grad()
    def tokens(self, model: Backbone, level: float) -> dict[str, torch.Tensor]:
        """The tokens of each block, and of the input, at a noise level."""
        timestep = timestep_of_noise(model, level, self.latents[0])
        draw = generator(0, "readout", f"{level:g}")
        noise = torch.randn(self.latents.shape, generator=draw)
        found: dict[str, list[torch.Tensor]] = {}
        for first in range(0, len(self.latents), BATCH):
            part = slice(first, first + BATCH)
            latents, times = self.latents[part], timestep.expand(len(self.latents[part]))
            text = {name: value[part] for name, value in self.text.items()}
            with ExitStack() as stack:
                taps = {n: stack.enter_context(tap(model.block(n))) for n in BLOCKS}
                model.denoising_loss(latents, text, noise[part], times)
                grids = {f"block {n}": model.grid(t.take(), latents) for n, t in taps.items()}
            noisy = model.diffusion.add_noise(latents, noise[part], times)
            patch = model.geometry.patch
            b, f, c, h, w = noisy.shape
            cut = noisy.reshape(b, f, c, h // patch, patch, w // patch, patch)
            cut = cut.permute(0, 1, 3, 5, 2, 4, 6).flatten(4)
            grids["input"] = grids[f"block {BLOCKS[0]}"].with_tokens(cut)
            for name, grid in grids.items():
                found.setdefault(name, []).append(grid.since(self.start).tokens.flatten(0, 3))
        return {name: torch.cat(parts).double() for name, parts in found.items()}


def r_squared(
    fitted: torch.Tensor, truth: torch.Tensor, read: torch.Tensor, theirs: torch.Tensor
) -> dict[str, float]:
    """R^2 on other clips, for each part of the truth, of a ridge regression.

    Its strength is the best of a few on the last fifth of the clips that it is fitted to.
    """

    def predicted(
        x: torch.Tensor, y: torch.Tensor, unseen: torch.Tensor, strength: float
    ) -> torch.Tensor:
        mean, scale = x.mean(0), x.std(0).clamp(min=1e-6)
        z, centre = (x - mean) / scale, y.mean(0)
        gram = z.T @ z + strength * torch.eye(z.shape[1], dtype=z.dtype)
        weights = torch.linalg.solve(gram, z.T @ (y - centre))
        return (unseen - mean) / scale @ weights + centre

    cut = len(fitted) * 4 // 5
    errors = [
        float((predicted(fitted[:cut], truth[:cut], fitted[cut:], s) - truth[cut:]).square().mean())
        for s in STRENGTHS
    ]
    best = STRENGTHS[int(np.argmin(errors))]
    error = (predicted(fitted, truth, read, best) - theirs).square().mean(0)
    spread = (theirs - truth.mean(0)).square().mean(0)
    found = {}
    for name, facts in TELLS.items():
        own = [body * FACTS + fact for body in range(len(COLOURS)) for fact in facts]
        found[name] = 1 - float(error[own].sum() / spread[own].sum())
    return found


def rows(
    recipe: Recipe, models: dict[str, Path], fitted: int, read: int
) -> Iterator[dict[str, object]]:
    """A row for each model, noise level and block."""
    coder = load_coder(recipe)
    ours, theirs = Read(recipe, coder, fitted, FITTED), Read(recipe, coder, read, READ)
    for name, model in compared(recipe, models):
        for level in LEVELS:
            seen, unseen = ours.tokens(model, level), theirs.tokens(model, level)
            for place, tokens in seen.items():
                found = r_squared(tokens, ours.truth, unseen[place], theirs.truth)
                yield {"model": name, "noise": f"{level:g}", "at": place} | {
                    part: f"{value:.3f}" for part, value in found.items()
                }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=RUN")
    parser.add_argument("--fitted", type=int, default=400, help="clips to fit the readouts to")
    parser.add_argument("--read", type=int, default=120, help="clips to read")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    models = named(arguments.models)
    recipe = StudyRecipe.from_yaml(SHORT).recipe
    keep(rows(recipe, models, arguments.fitted, arguments.read), arguments.out)


if __name__ == "__main__":
    main()
