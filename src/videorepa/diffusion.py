"""Noising and loss for models that predict the velocity of a diffusion process or of a flow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

Latents = Float[Tensor, "b ..."]

STEPS = 1000
"""Timesteps of every model here: a flow's is 1000 sigma, a diffusion's an integer from 0 to 999."""


class Denoised(NamedTuple):
    """The result of one pass of the transformer over a batch.

    Args:
      loss: The denoising loss of each sample.
      clean: The predicted latents without noise.
      sigma: The noise level of each input, 0 (no noise) to 1 (noise alone).
      source: What `loss` and `clean` are both computed from, where their gradients meet.
      slope: The derivative of each number in `clean` by the one in its place in `source`.
    """

    loss: Float[Tensor, " b"]
    clean: Latents
    sigma: Float[Tensor, " b"]
    source: Latents
    slope: Float[Tensor, "b ..."]


class _Shown:
    """Leaves latents out of a loss that are no prediction, since the model was given them."""

    def __init__(self, mask: Bool[Tensor, "b ..."] | None) -> None:
        self._mask = mask

    def mean(self, errors: Latents) -> Float[Tensor, " b"]:
        """The mean of each sample over the latents that are not held."""
        if self._mask is None:
            return errors.flatten(1).mean(1)
        counts = (~self._mask).expand_as(errors).flatten(1).sum(1)
        return torch.where(self._mask, 0.0, errors).flatten(1).sum(1) / counts

    def true(self, predicted: Latents, clean: Latents) -> Latents:
        """The predicted latents, with the true ones where they are held."""
        return predicted if self._mask is None else torch.where(self._mask, clean, predicted)

    def slope(self, slope: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
        """The derivative of what `true` gives, for that of the predicted latents."""
        return slope if self._mask is None else torch.where(self._mask, 0.0, slope)


class VPrediction:
    """Variance-preserving diffusion with v-prediction (arXiv 2202.00512, section 4).

    Args:
      alphas_cumprod: a_t, the variance of the signal left at each timestep. It comes from the
        checkpoint's own scheduler, so that its SNR shift and zero terminal SNR hold in training
        as in sampling.
    """

    def __init__(self, alphas_cumprod: Float[Tensor, " steps"]) -> None:
        self.alphas_cumprod = alphas_cumprod.double()
        self._signal = self.alphas_cumprod.sqrt().float()
        self._spread = (1 - self.alphas_cumprod).sqrt().float()

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Int[Tensor, " b"]:
        """Draw timesteps uniformly."""
        return torch.randint(0, len(self.alphas_cumprod), (count,), generator=generator)

    def add_noise(self, clean: Latents, noise: Latents, timestep: Int[Tensor, " b"]) -> Latents:
        """x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) noise."""
        signal, spread = self._scales(timestep, clean)
        return signal * clean + spread * noise

    def denoised(
        self,
        velocity: Latents,
        clean: Latents,
        noise: Latents,
        timestep: Int[Tensor, " b"],
        held: Bool[Tensor, "b ..."] | None = None,
    ) -> Denoised:
        """x0_pred = sqrt(a_t) x_t - sqrt(1 - a_t) v, and the loss of each sample.

        loss = mean of (x0_pred - x_0)^2 / (1 - a_t)

        Args:
          velocity: v, the transformer's output for the result of `add_noise`.
          clean: x_0, the latents.
          noise: The noise that was added.
          timestep: t of each sample.
          held: Latents that the model was given without noise. They have no loss and get no
            gradient, and the predicted latents are the true ones there.
        """
        signal, spread = self._scales(timestep, clean)
        noisy = self.add_noise(clean, noise, timestep)
        predicted = signal * noisy - spread * velocity.float()
        shown, slope = _Shown(held), torch.ones_like(spread)
        loss = shown.mean((predicted - clean) ** 2 / spread**2)
        true = shown.true(predicted, clean)
        return Denoised(loss, true, spread.flatten(), predicted, shown.slope(slope))

    def noise_error(self, denoised: Denoised) -> Float[Tensor, " b"]:
        """The mean of (noise - predicted noise)^2 of each sample: a_t times the loss."""
        return (1 - denoised.sigma**2) * denoised.loss

    def _scales(self, timestep: Int[Tensor, " b"], like: Latents) -> tuple[Tensor, Tensor]:
        # They stay on the device, so that a step does not wait for them.
        self._signal, self._spread = self._signal.to(like.device), self._spread.to(like.device)
        timestep = timestep.to(like.device)
        shape = -1, *[1] * (like.dim() - 1)
        return self._signal[timestep].view(shape), self._spread[timestep].view(shape)


@dataclass(frozen=True)
class FlowMatching:
    """Rectified flow (arXiv 2209.03003): a straight line from the latents to the noise.

    Args:
      shift: Moves timesteps towards the noise: sigma -> shift sigma / (1 + (shift - 1) sigma)
        (arXiv 2403.03206, equation 23). The more tokens a clip has, the more noise it takes to
        hide it, so each model has a shift of its own in training and sampling.
      logit_normal: Draw sigma before the shift as the sigmoid of a standard normal number (same
        paper, section 3.1), which favours the middle; otherwise uniformly.
      low: Draw no sigma below this, after the shift. Relative densities stay.
      high: Draw no sigma above this, after the shift.
    """

    shift: float = 1.0
    logit_normal: bool = False
    low: float = 0.0
    high: float = 1.0

    def sample_timesteps(self, count: int, generator: torch.Generator) -> Float[Tensor, " b"]:
        """Draw timesteps 1000 sigma, not rounded."""
        # The inverse of the distribution function, restricted to the sigmas from low to high.
        first, last = self._share_below(torch.tensor([self.low, self.high], dtype=torch.float64))
        share = torch.rand(count, generator=generator, dtype=torch.float64)
        share = first + (last - first) * share
        u = torch.sigmoid(torch.special.ndtri(share)) if self.logit_normal else share
        sigma = self.shift * u / (1 + (self.shift - 1) * u)
        return (STEPS * sigma).float()

    def _share_below(self, sigma: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
        u = sigma / (self.shift - (self.shift - 1) * sigma)
        return torch.special.ndtr(torch.logit(u)) if self.logit_normal else u

    def add_noise(self, clean: Latents, noise: Latents, timestep: Num[Tensor, " b"]) -> Latents:
        """x_t = (1 - sigma) x_0 + sigma noise."""
        sigma = self._sigma(timestep, clean)
        return (1 - sigma) * clean + sigma * noise

    def denoised(
        self,
        velocity: Latents,
        clean: Latents,
        noise: Latents,
        timestep: Num[Tensor, " b"],
        held: Bool[Tensor, "b ..."] | None = None,
    ) -> Denoised:
        """x0_pred = x_t - sigma v, and the loss of each sample.

        loss = mean of (v - (noise - x_0))^2

        Args:
          velocity: v, the transformer's output for the result of `add_noise`.
          clean: x_0, the latents.
          noise: The noise that was added.
          timestep: 1000 sigma of each sample.
          held: As in `VPrediction.denoised`.
        """
        sigma = self._sigma(timestep, clean)
        velocity = velocity.float()
        predicted = self.add_noise(clean, noise, timestep) - sigma * velocity
        shown = _Shown(held)
        loss = shown.mean((velocity - (noise - clean)) ** 2)
        true = shown.true(predicted, clean)
        return Denoised(loss, true, sigma.flatten(), velocity, shown.slope(-sigma))

    def noise_error(self, denoised: Denoised) -> Float[Tensor, " b"]:
        """The loss itself: a flow's prediction is the velocity, and no noise is predicted."""
        return denoised.loss

    def _sigma(self, timestep: Num[Tensor, " b"], like: Latents) -> Tensor:
        sigma = timestep.to(like.device, torch.float32) / STEPS
        return sigma.view(-1, *[1] * (like.dim() - 1))
