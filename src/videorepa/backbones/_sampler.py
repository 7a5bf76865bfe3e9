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
    """The seed of a clip's noise.

    Args:
      prompt: The prompt's text.
      k: The clip's number among those of one prompt.
      nth: How many earlier prompts have the same text.
      seed: The seed of the whole set of clips.
    """
    return stable_seed("generate", prompt, k, nth, seed)


class Sampler:
    """A stock pipeline with its settings. It samples clips one by one, so none depends on another.

    Args:
      backbone: The model, with all its parts loaded.
      size: The clips' size.
      settings: The sampling settings.
      transformer: Used in place of the backbone's own, for models in training.
    """

    def __init__(
        self, backbone: Backbone, size: ClipSize, settings: Generation, transformer: Any = None
    ) -> None:
        self.pipeline = backbone.pipeline(transformer)
        self.pipeline.set_progress_bar_config(disable=True)
        self.arguments = backbone.sampling(size, settings)
        backbone.guide(settings)

    def sample(self, prompt: str, seed: int) -> np.ndarray:
        """Sample a clip, (frames, height, width, 3) uint8, from the noise of a seed.

        Raises:
          UserError: The model gives values that are not finite.
        """
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
