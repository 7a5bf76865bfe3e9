"""Measures how a teacher's relations spread, and those of a model's tokens.

Run: python experiments/spread.py --models control-0=RUN aligned-0=RUN [--out docs/study/spread.csv]

A relation is the cosine of two tokens of a clip; TRD pulls a model's towards a teacher's. The base
model comes first, then a random copy of it, then the models, each at every noise level and at the
tapped block, whose tokens are brought to the video teacher's grid as without a projector. Then come
the teachers. Over pairs of different tokens of held-out clips the columns are:

- mean: the mean relation
- places: the standard deviation, over pairs, of a pair's mean over clips, which is the same
  whatever happens in a clip
- clips: the standard deviation of what is left, which sets a clip apart
- loss: TRD's loss between the base model and this, with margin 0.1, without a projector
- like_places, like_clips: the correlation of either part with the base model's, at the same noise
- like_truth: the correlation of a clip's relations with the truth's, a mean over clips
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from held_out import CPU, Clips, compared, load_coder, named
from rows import keep
from videorepa.align.resampling import resample
from videorepa.align.taps import tap
from videorepa.backbones import Backbone, timestep_of_noise
from videorepa.encoders import load_encoder
from videorepa.encoders.truth import Truth
from videorepa.lab.study.recipe import SHORT, StudyRecipe
from videorepa.losses import Relations, unit_tokens
from videorepa.losses.relation import Relation
from videorepa.recipe import Recipe
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid

LEVELS = (0.2, 0.75)
BLOCK = 4


class Parts:
    """The relations of clips in three parts, which add up to them."""

    def __init__(self, grid: TokenGrid) -> None:
        unit = unit_tokens(grid).flatten(1, 3)
        relations = unit @ unit.mT
        row, column = torch.triu_indices(*relations.shape[1:], offset=1)
        relations = relations[:, row, column]
        self.grid = grid
        self.mean = relations.mean()
        self.places: Float[Tensor, " p"] = relations.mean(0) - self.mean
        self.clips: Float[Tensor, "b p"] = relations - relations.mean(0)

    def row(self, base: Parts, truth: TokenGrid) -> dict[str, str]:
        values = {
            "mean": self.mean,
            "places": self.places.std(),
            "clips": self.clips.std(),
            "loss": Relation(margin=0.1)(base.grid, self.grid),
            "like_places": _cosine(self.places, base.places),
            "like_clips": _cosine(self.clips, base.clips),
            "like_truth": Relations(self.grid).correlation(Relations(truth)).mean(),
        }
        return {key: f"{value:.3f}" for key, value in values.items()}


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    """0 where either does not vary, but for rounding."""
    a, b = a.flatten().double(), b.flatten().double()
    norms = a.norm() * b.norm()
    return torch.where(norms > 1e-6 * len(a), (a @ b) / norms.clamp(min=1e-30), 0.0)


class Shown(Clips):
    """Held-out clips as models and teachers see them."""

    def tokens(self, model: Backbone, level: float) -> TokenGrid:
        """The tapped block's tokens at a noise level."""
        timestep = timestep_of_noise(model, level, self.latents[0]).expand(len(self.latents))
        noise = torch.randn(self.latents.shape, generator=generator(0, "spread", f"{level:g}"))
        with tap(model.block(BLOCK)) as tapped:
            model.denoising_loss(self.latents, self.text, noise, timestep)
            return model.grid(tapped.take(), self.latents)

    def taught(self) -> Iterator[tuple[str, TokenGrid]]:
        """Names of teachers, and what they give."""
        size = {"frames": 16, "height": 64, "width": 64}
        video, image = (
            {"name": name, "weights": "micro"} | size for name in ("videomae", "dinov2")
        )
        shown = self.video()
        yield "video teacher", load_encoder(**video)(shown)
        for draw, name in enumerate(("untrained", "untrained, drawn anew")):
            untrained = load_encoder("untrained", "none", of=video, draw=draw)
            yield f"video teacher, {name}", untrained(shown)
        yield "image teacher", load_encoder(**image)(shown)
        untrained = load_encoder("untrained", "none", of=image)
        yield "image teacher, untrained", untrained(shown)
        yield "raw pixels", load_encoder("pixels", "none", patch=8, **size)(shown)
        yield "places", load_encoder("places", "none", patch=8, **size)(shown)
        near = load_encoder("places", "none", patch=8, longest=40, **size)
        yield "places, longest 40", near(shown)
        yield "truth", Truth().load(CPU).see(shown, self.scenes)


@torch.no_grad()
def rows(recipe: Recipe, models: dict[str, Path], clips: int) -> Iterator[dict[str, str]]:
    shown = Shown(recipe, load_coder(recipe), clips)
    teachers = dict(shown.taught())
    like = teachers["video teacher"]
    teachers = {name: resample(grid, like) for name, grid in teachers.items()}
    truth = teachers["truth"]
    for level in LEVELS:
        base: Parts | None = None
        for name, model in compared(recipe, models):
            parts = Parts(resample(shown.tokens(model, level), like))
            base = base or parts
            yield {"source": name, "noise": f"{level:g}"} | parts.row(base, truth)
        assert base is not None
        for name, grid in teachers.items():
            yield {"source": name, "noise": f"{level:g}"} | Parts(grid).row(base, truth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="*", default=[], metavar="NAME=RUN")
    parser.add_argument("--clips", type=int, default=48)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    recipe = StudyRecipe.from_yaml(SHORT).recipe
    keep(rows(recipe, named(arguments.models), arguments.clips), arguments.out)


if __name__ == "__main__":
    main()
