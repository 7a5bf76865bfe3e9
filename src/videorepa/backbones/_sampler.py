"""Samples clips from prompts through the stock diffusers pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from videorepa.backbones import Backbone
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.randomness import stable_seed


def noise_seed(prompt: str, k: int, nth: int = 0, seed: int = 0) -> int:
    """What the noise of a clip is drawn from: its prompt's text, its number k, the how-many-th
    time the text occurs among the prompts, from 0, and the seed of all of them."""
    return stable_seed("generate", prompt, k, nth, seed)


class Sampler:
    """A stock pipeline with its settings; one clip at a time, so that none depends on the others.

    transformer: used in place of the backbone's own, for models in training.
    """

    def __init__(
        self, backbone: Backbone, size: ClipSize, settings: Generation, transformer: Any = None
    ) -> None:
        self.pipeline = backbone.pipeline(transformer)
        self.pipeline.set_progress_bar_config(disable=True)
        self.arguments = backbone.sampling(size, settings)

    def sample(self, prompt: str, seed: int) -> np.ndarray:
        """One clip, (frames, height, width, 3) uint8, from the noise of that seed."""
        frames = self.pipeline(
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **self.arguments,
        ).frames[0]
        if not np.isfinite(frames).all():
            raise UserError(
                f"The model gives values that are not finite for {prompt[:80]!r}. Its weights are "
                "damaged, or the precision is too low for it: try float32."
            )
        return (frames * 255.0).round().clip(0, 255).astype(np.uint8)
