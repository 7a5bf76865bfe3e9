"""v-prediction and flow matching, against closed forms and the stock schedulers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from videorepa.data.order import clip_index, sample_numbers
from videorepa.diffusion import FlowMatching, VPrediction
from videorepa.system.randomness import stable_seed

ALPHAS = torch.cat([torch.linspace(0.9999, 0.01, 999), torch.zeros(1)])


@given(step=st.integers(0, 999), seed=st.integers(0, 99))
def test_the_loss_is_the_squared_error_of_the_velocity(step: int, seed: int) -> None:
    """Any step, the last with no signal left included."""
    draw = torch.Generator().manual_seed(seed)
    clean, noise, guess = torch.randn(3, 2, 3, 4, generator=draw)
    timestep = torch.tensor([step, step])
    diffusion = VPrediction(ALPHAS)
    a = ALPHAS[step]
    velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
    expected = ((guess - velocity) ** 2).flatten(1).mean(1)
    found = diffusion.denoised(guess, clean, noise, timestep)
    torch.testing.assert_close(found.loss, expected, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(found.sigma, (1 - a).sqrt().expand(2))


@pytest.mark.parametrize("kind", [VPrediction(ALPHAS), FlowMatching()], ids=["v", "flow"])
def test_the_true_velocity_gives_the_clean_latents_and_no_loss(kind) -> None:
    clean, noise = torch.randn(2, 3, 2, 4)
    timestep = torch.tensor([0, 400, 999])
    if isinstance(kind, VPrediction):
        a = ALPHAS[timestep][:, None, None]
        velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
    else:
        velocity = noise - clean
    found = kind.denoised(velocity, clean, noise, timestep)
    torch.testing.assert_close(found.clean, clean, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(found.loss, torch.zeros(3), rtol=0, atol=1e-6)
    assert found.sigma.diff().min() > 0, "later timesteps are noisier"


@given(timestep=st.floats(0, 1000), seed=st.integers(0, 99))
def test_the_flow_is_a_straight_line_from_latents_to_noise(timestep: float, seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    clean, noise, guess = torch.randn(3, 1, 3, 4, generator=draw)
    t, sigma = torch.tensor([timestep]), timestep / 1000
    flow = FlowMatching(shift=5.0)
    noisy = flow.add_noise(clean, noise, t)
    torch.testing.assert_close(noisy, torch.lerp(clean, noise, sigma))
    found = flow.denoised(guess, clean, noise, t)
    torch.testing.assert_close(found.loss, (guess - (noise - clean)).square().flatten(1).mean(1))
    torch.testing.assert_close(found.clean, noisy - sigma * guess)
    torch.testing.assert_close(found.sigma, torch.tensor([sigma]))


def test_flow_noise_agrees_with_the_stock_scheduler() -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    clean, noise = torch.randn(2, 3, 2, 4, 4, 4)
    timestep = scheduler.timesteps[[0, 500, 999]]
    ours = FlowMatching().add_noise(clean, noise, timestep)
    torch.testing.assert_close(ours, scheduler.scale_noise(clean, timestep, noise))


@pytest.mark.parametrize("logit_normal", [False, True], ids=["uniform", "logit-normal"])
@pytest.mark.parametrize("shift", [1.0, 7.0])
def test_timesteps_of_a_flow_have_the_named_density(shift: float, logit_normal: bool) -> None:
    """Quantiles against those of the definition, drawn without the inverse that the code uses."""
    count = 40_000
    flow = FlowMatching(shift, logit_normal)
    found = flow.sample_timesteps(count, torch.Generator().manual_seed(0)) / 1000
    draw = torch.Generator().manual_seed(1)
    u = torch.rand(count, generator=draw)
    if logit_normal:
        u = torch.randn(count, generator=draw).sigmoid()
    expected = shift * u / (1 + (shift - 1) * u)
    at = torch.linspace(0.05, 0.95, 10)
    torch.testing.assert_close(found.quantile(at), expected.quantile(at), rtol=0, atol=0.01)
    # An expert draws its part of the same density, no more and no less.
    low, high = 0.5, 0.875
    part = FlowMatching(shift, logit_normal, low, high)
    drawn = part.sample_timesteps(count, torch.Generator().manual_seed(2)) / 1000
    assert low <= drawn.min() and drawn.max() <= high
    inside = expected[(expected >= low) & (expected <= high)]
    torch.testing.assert_close(drawn.quantile(at), inside.quantile(at), rtol=0, atol=0.01)


def test_noise_agrees_with_the_stock_scheduler(twins) -> None:
    from diffusers import CogVideoXDPMScheduler

    scheduler = CogVideoXDPMScheduler.from_pretrained(twins["backbone"], subfolder="scheduler")
    clean, noise = torch.randn(2, 3, 2, 4, 4, 4)
    timestep = torch.tensor([0, 500, 999])
    ours = VPrediction(scheduler.alphas_cumprod).add_noise(clean, noise, timestep)
    torch.testing.assert_close(ours, scheduler.add_noise(clean, noise, timestep))


def test_timesteps_cover_all_steps() -> None:
    drawn = VPrediction(ALPHAS[:50]).sample_timesteps(5000, torch.Generator().manual_seed(0))
    assert set(drawn.tolist()) == set(range(50))


@given(
    clips=st.integers(1, 30), batch=st.integers(1, 4), micro=st.integers(1, 3), seed=st.integers(0)
)
def test_every_clip_is_used_once_an_epoch(clips: int, batch: int, micro: int, seed: int) -> None:
    numbers = [
        number
        for step in range(3 * clips)
        for part in range(micro)
        for number in sample_numbers(step, part, 0, 1, batch, micro)
    ]
    assert numbers == list(range(3 * clips * batch * micro))
    for epoch in range(2):
        used = [clip_index(seed, n, clips) for n in numbers[epoch * clips : (epoch + 1) * clips]]
        assert sorted(used) == list(range(clips))


@given(world=st.integers(1, 4), micro=st.integers(1, 3), step=st.integers(0, 5))
def test_ranks_share_a_steps_samples(world: int, micro: int, step: int) -> None:
    alone = [
        n for m in range(micro * world) for n in sample_numbers(step, m, 0, 1, 2, micro * world)
    ]
    shared = [
        n
        for m in range(micro)
        for r in range(world)
        for n in sample_numbers(step, m, r, world, 2, micro)
    ]
    assert shared == alone


def test_seeds_never_change() -> None:
    """Files made years apart must have the same noise: these numbers are part of the format."""
    assert stable_seed("generate", "A ball falls.", 0) == 3904725046572390445
    assert stable_seed("a", "bc") != stable_seed("ab", "c")
