"""Finds the timestep at which a model's input has a given share of noise, for any model."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor

from videorepa.errors import UserError
from videorepa.system.randomness import generator

TIMESTEPS_TRIED = 4096

LEVEL_TOLERANCE = 0.02


def timestep_of_noise(
    backbone: Any, level: float, latents: Float[Tensor, "f c h w"]
) -> Num[Tensor, " 1"]:
    """The model's timestep at which the noise's share of the variance is nearest to the level.

    The shares are measured by adding noise to ones and zeros at many timesteps, which works for
    any kind of diffusion.

    Args:
      backbone: The live model.
      level: The noise's share of the noisy latents' variance, 0 to 1.
      latents: A clip's latents; on their size the model's timesteps may depend.

    Raises:
      UserError: No timestep has about this level.
    """
    many = latents.expand(TIMESTEPS_TRIED, *latents.shape)
    drawn = backbone.sample_timesteps(many, generator(0, "scan timesteps")).unique()
    one = torch.ones(len(drawn), 1, device=drawn.device)
    add_noise = backbone.diffusion.add_noise
    signal, spread = add_noise(one, 0 * one, drawn), add_noise(0 * one, one, drawn)
    share = (spread**2 / (signal**2 + spread**2))[:, 0]
    best = (share - level).abs().argmin()
    if abs(share[best] - level) > LEVEL_TOLERANCE:
        raise UserError(
            f"No timestep of the base model has the noise level {level:g}; the nearest is "
            f"{share[best]:.3f}, of {share.min():.3f} to {share.max():.3f}."
        )
    return drawn[best][None]
