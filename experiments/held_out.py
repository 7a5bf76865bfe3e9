"""The clips and models that the experiments on blocks look at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from videorepa.artifacts.run import Run
from videorepa.backbones import Backbone
from videorepa.data.source import LabSource
from videorepa.data.video import to_video
from videorepa.recipe import Recipe
from videorepa.settings.sections import LabClips

CPU = torch.device("cpu")
READ = 901
"""The series of the clips that no model was trained on."""
BATCH = 24


class Clips:
    """Clips of a series as models see them, at most a batch of them as video at a time.

    Attributes:
      sampled: The clips as the simulator draws them, with their scenes.
      latents: What the autoencoder makes of them.
      text: Their captions, encoded.
    """

    def __init__(self, recipe: Recipe, coder: Backbone, count: int, series: int = READ) -> None:
        lab = LabClips(clips=count, seed=series)
        source = LabSource(recipe.data.model_copy(update={"lab": lab}))
        self.sampled = [source.sample(number) for number in range(count)]
        self.scenes = [clip.scene for clip in self.sampled]
        parts = (self.video(first, BATCH) for first in range(0, count, BATCH))
        self.latents = torch.cat([coder.latents(coder.encode_video(part), None) for part in parts])
        self.text = coder.encode_text([clip.caption for clip in source.items])

    def video(self, first: int = 0, count: int | None = None) -> torch.Tensor:
        """The clips from `first` on, by default all, as [b, t, c, h, w] in [-1, 1]."""
        last = None if count is None else first + count
        return to_video(np.stack([clip.frames for clip in self.sampled[first:last]]))


def load_coder(recipe: Recipe) -> Backbone:
    """What clips and captions are encoded with."""
    return recipe.backbone.load(("vae", "text_encoder"), CPU, torch.float32)


def compared(recipe: Recipe, models: dict[str, Path]) -> Iterator[tuple[str, Backbone]]:
    """The base model, a random copy of it, and the models of runs, with their names."""
    for name in ("base", "random", *models):
        if name in models:
            yield name, Run.open(models[name]).backbone(("transformer",), CPU, torch.float32)
            continue
        model = recipe.backbone.load(("transformer",), CPU, torch.float32)
        if name == "random":
            model.reinitialise(0)
        yield name, model


def named(items: list[str]) -> dict[str, Path]:
    """The runs that were given as NAME=RUN."""
    return {name: Path(path) for name, path in (item.split("=", 1) for item in items)}
