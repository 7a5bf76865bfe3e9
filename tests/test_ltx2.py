"""LTX-2 and 2.3 without sound, as the stock pipelines' passes in which the two are isolated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from PIL import Image

from twins import TWINS
from videorepa.conditioning import Opening
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize, Generation, Lora

CPU = torch.device("cpu")
CAPTION = "A red ball falls."
SIZE = ClipSize(frames=17, height=64, width=64)
STEP = 1
"""Which of the three steps of sampling is looked at."""


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module", params=["ltx2", "ltx2.3"])
def live(request, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = TWINS[request.param][1](tmp_path_factory.mktemp("ltx2") / request.param)
    spec = plugins.description("backbones", "ltx2")(weights=str(folder))
    return spec.load(("transformer", "vae", "text_encoder"), CPU)


@dataclass
class Isolated:
    """The isolated pass in one step of the stock pipeline, and what its scheduler made of it."""

    opening: Opening | None
    video: torch.Tensor
    inputs: dict[str, Any]
    output: torch.Tensor
    clean: torch.Tensor

    @property
    def noisy(self) -> torch.Tensor:
        return unpacked(self.inputs["hidden_states"])


def unpacked(tokens: torch.Tensor) -> torch.Tensor:
    return tokens.unflatten(1, (3, 2, 2)).permute(0, 1, 4, 2, 3)


@pytest.fixture(scope="module", params=[False, True], ids=["text", "image"])
def isolated(request, live: Any) -> Isolated:
    from diffusers import FlowMatchEulerDiscreteScheduler as Scheduler

    video = torch.rand(1, SIZE.frames, 3, SIZE.height, SIZE.width, generator=draw(1))
    video = (video * 255.0).round() / 255.0
    image = Image.fromarray((video[0, 0] * 255.0).round().byte().permute(1, 2, 0).numpy())
    given = {"image": image, "image_crf": 0} if request.param else {}
    pipeline = live.pipeline(from_image=request.param)
    pipeline.set_progress_bar_config(disable=True)
    passes: list[tuple[dict[str, Any], torch.Tensor]] = []
    steps: list[torch.Tensor] = []
    real = Scheduler.step

    def step(self: Any, velocity: torch.Tensor, timestep: Any, sample: Any, **more: Any) -> Any:
        if self is pipeline.scheduler:  # Not the one of sound.
            steps.append(sample - self.sigmas[len(steps)] * velocity)
        return real(self, velocity, timestep, sample, **more)

    def watch(module: Any, args: Any, inputs: dict[str, Any], output: Any) -> None:
        if inputs["isolate_modalities"]:
            passes.append((inputs, output[0]))

    settings = Generation(**live.spec.generation).changed(steps=3, guidance_scale=1.0)
    handle = live.transformer.register_forward_hook(watch, with_kwargs=True)
    with patch.object(Scheduler, "step", step):
        arguments = live.sampling(SIZE, settings) | live.unguided() | given
        pipeline(prompt=CAPTION, generator=draw(3), output_type="latent", **arguments)
    handle.remove()
    inputs, output = passes[STEP]
    clean = steps[STEP]
    clean = clean.transpose(1, 2) if clean.dim() == 5 else unpacked(clean)
    opening = Opening((1,)) if request.param else None
    return Isolated(opening, video, inputs, output, clean)


def timestep_of(isolated: Isolated) -> torch.Tensor:
    return isolated.inputs["sigma"].flatten()[:1]


def test_what_concerns_the_video_is_as_the_stock_pipelines_isolated_pass(
    live: Any, isolated: Isolated
) -> None:
    noisy, theirs = isolated.noisy, isolated.inputs
    ours = live.inputs(noisy, live.encode_text([CAPTION]), timestep_of(isolated))
    if isolated.opening is not None:
        ours = live.shown(ours, noisy, isolated.opening)
    sound = ("audio_hidden_states", "audio_num_frames")
    assert not ours["audio_hidden_states"].any()
    for name in ours.keys() - set(sound):
        value, expected = ours[name], theirs[name]
        if isinstance(expected, torch.Tensor) and value.dtype == torch.bool:
            value = value.to(expected.dtype)
        torch.testing.assert_close(value, expected, msg=lambda text, n=name: f"{n}: {text}")
    left = theirs.keys() - ours.keys()
    assert left == {
        *("audio_coords", "attention_kwargs", "return_dict"),
        *("spatio_temporal_guidance_blocks", "perturbation_mask"),
    }
    with torch.no_grad():
        output = live.transformer(**ours, return_dict=False)[0]
    torch.testing.assert_close(output, isolated.output, rtol=1e-4, atol=1e-5)


def test_loss_and_predicted_latents_are_the_stock_schedulers(live: Any, isolated: Isolated) -> None:
    """Clean latents and noise are chosen so that they mix to the sample that the pipeline had."""
    noisy, timestep = isolated.noisy, timestep_of(isolated)
    shown, share = (isolated.opening is not None) * 1, timestep.item() / 1000
    clean = torch.randn(noisy.shape, generator=draw(4))
    clean[:, :shown] = noisy[:, :shown]
    noise = (noisy - (1 - share) * clean) / share
    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: tuple[torch.Tensor, ...]) -> None:
        output[0].retain_grad()
        outputs.append(output[0])

    live.transformer.proj_out.requires_grad_(True)
    handle = live.transformer.register_forward_hook(keep)
    text = live.encode_text([CAPTION])
    denoised = live.denoising_loss(clean, text, noise, timestep, isolated.opening)
    handle.remove()
    expected = isolated.clean[:, -(3 - shown) :]
    torch.testing.assert_close(denoised.clean[:, shown:], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(denoised.clean[:, :shown], clean[:, :shown])
    loss = ((expected - clean[:, shown:]) / share).square().mean()
    torch.testing.assert_close(denoised.loss, loss[None], rtol=1e-3, atol=1e-4)
    (denoised.loss.sum() + denoised.clean.sum()).backward()
    live.transformer.proj_out.requires_grad_(False)
    live.transformer.zero_grad()
    (output,) = outputs
    assert output.grad is not None
    gradient = unpacked(output.grad)
    assert not gradient[:, :shown].any() and gradient[:, shown:].all()


def test_the_image_is_the_clips_own_first_latent(live: Any, isolated: Isolated) -> None:
    if isolated.opening is None:
        pytest.skip("it is shown none")
    own = live.latents(live.encode_video(isolated.video), None)
    torch.testing.assert_close(own[:, :1], isolated.noisy[:, :1], rtol=1e-4, atol=1e-4)


def test_latents_are_scaled_as_the_stock_pipeline_unscales_them(live: Any) -> None:
    latents = torch.randn(1, 3, 4, 2, 2, generator=draw(1))
    vae = live.vae
    decoded = live.stock._denormalize_latents(
        latents.transpose(1, 2), vae.latents_mean, vae.latents_std, vae.config.scaling_factor
    )
    moments = torch.cat([decoded, torch.full_like(decoded, -30.0)], dim=1)
    torch.testing.assert_close(live.latents(moments, None), latents, rtol=1e-4, atol=1e-5)


def test_text_is_stored_after_the_connectors(live: Any) -> None:
    text = live.encode_text([CAPTION])
    raw, mask, _, _ = live.stock.encode_prompt(CAPTION, do_classifier_free_guidance=False)
    assert raw.shape[-1] == 64 and not mask.all()
    video, sound, full = live.connectors.stock(raw, mask)
    assert full.all() and text["encoder_attention_mask"].all()
    for made, expected in zip(
        live.connectors(text["encoder_hidden_states"], mask), (video, sound, mask), strict=True
    ):
        torch.testing.assert_close(made, expected)


def test_sound_gets_no_adapters_and_no_gradient(live: Any) -> None:
    spec = live.spec
    own = spec.load(("transformer",), CPU)
    spec.add_lora(own.transformer, Lora(rank=2, alpha=4))
    trained = {n: p for n, p in own.transformer.named_parameters() if p.requires_grad}
    assert trained and not any("audio" in name for name in trained)
    latents = torch.randn(1, 3, 4, 2, 2, generator=draw(1))
    noise, timestep = torch.randn(latents.shape, generator=draw(2)), torch.tensor([500.0])
    own.denoising_loss(latents, live.encode_text([CAPTION]), noise, timestep).loss.sum().backward()
    missed = [n for n, p in trained.items() if "lora_B" in n and not p.grad.any()]
    assert not missed


def test_noise_levels_are_stretched_as_the_authors_stretch_them(live: Any) -> None:
    share = live.sample_timesteps(torch.zeros(8000, 1, 1, 32, 32), draw(0)) / 1000
    assert share.min() >= 0 and share.max() <= 1
    # At 1024 tokens the logit's mean is 0.95. A tenth is uniform.
    low, middle, high = torch.sigmoid(0.95 + torch.tensor([-2.5758, 0.0, 3.0902]))
    median = ((middle - low) / (high - low)).item()
    below = (share < median).float().mean().item()
    assert below == pytest.approx(0.9 * 0.5 + 0.1 * median, abs=0.02)


def test_generate_s_pipeline_has_what_makes_sound(live: Any, tmp_path: Path) -> None:
    components = live.stock.components
    assert all(components[name] is not None for name in ("audio_vae", "vocoder"))
    without = live.spec.load(("text_encoder",), CPU).stock.components
    assert without["audio_vae"] is None and without["transformer"] is None
