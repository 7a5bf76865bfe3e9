"""Noising, target and weight, for models that predict the velocity of a diffusion process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

Latents = Float[Tensor, "b ..."]


@dataclass(frozen=True)
class Denoised:
    """What the model made of noisy latents.

    loss: of each sample. clean: the clean latents it predicts. sigma: each sample's noise level,
    0 to 1, the factor of the noise.
    """

    loss: Float[Tensor, " b"]
    clean: Latents
    sigma: Float[Tensor, " b"]


class VPrediction:
    """Variance-preserving diffusion with v-prediction (arXiv 2202.00512, section 4).

    alphas_cumprod: (steps,), the share of signal left at each timestep, from the checkpoint's own
    scheduler, so that its SNR shift and zero terminal SNR hold in training as in sampling.
    """

    def __init__(self, alphas_cumprod: Float[Tensor, " steps"]) -> None:
        self.alphas_cumprod = alphas_cumprod.double()

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Int[Tensor, " b"]:
        """Uniform over all timesteps."""
        return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator)

    def add_noise(self, clean: Latents, noise: Latents, timestep: Int[Tensor, " b"]) -> Latents:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise."""
        signal, spread = self._scales(timestep, clean)
        return signal * clean + spread * noise

    def denoised(
        self, velocity: Latents, noisy: Latents, clean: Latents, timestep: Int[Tensor, " b"]
    ) -> Denoised:
        """The loss is (x0_pred - x_0)^2 / (1 - a_t), with x0_pred from the velocity."""
        signal, spread = self._scales(timestep, clean)
        predicted = signal * noisy.float() - spread * velocity.float()
        loss = ((predicted - clean.float()) ** 2 / spread**2).flatten(1).mean(1)
        return Denoised(loss, predicted, spread.flatten())

    def _scales(self, timestep: Int[Tensor, " b"], like: Latents) -> tuple[Tensor, Tensor]:
        a = self.alphas_cumprod[timestep.cpu()].view(-1, *[1] * (like.dim() - 1))
        return (
            a.sqrt().to(like.device, torch.float32),
            (1 - a).sqrt().to(like.device, torch.float32),
        )
