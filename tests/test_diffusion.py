"""v-prediction: the published loss is the squared error of the velocity."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from videorepa.data.batches import clip_index, sample_numbers, stable_seed
from videorepa.diffusion import VPrediction

ALPHAS = torch.cat([torch.linspace(0.9999, 0.01, 999), torch.zeros(1)])


@given(step=st.integers(0, 999), seed=st.integers(0, 99))
def test_the_loss_is_the_squared_error_of_the_velocity(step: int, seed: int) -> None:
    """Any step, the last with no signal left included."""
    draw = torch.Generator().manual_seed(seed)
    clean, noise, guess = torch.randn(3, 2, 3, 4, generator=draw)
    timestep = torch.tensor([step, step])
    diffusion = VPrediction(ALPHAS)
    noisy = diffusion.add_noise(clean, noise, timestep)
    a = ALPHAS[step]
    velocity = a.sqrt() * noise - (1 - a).sqrt() * clean
    expected = ((guess - velocity) ** 2).flatten(1).mean(1)
    found = diffusion.denoised(guess, noisy, clean, timestep).loss
    torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-4)


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
