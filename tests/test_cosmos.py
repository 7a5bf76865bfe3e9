"""Cosmos-Predict2 and 2.5 shown frames in their own place, as the stock pipelines show them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from PIL import Image

from twins import TWINS
from videorepa.conditioning import Opening, frames_of
from videorepa.errors import UserError
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize, Continuation, Data, Generation

CPU = torch.device("cpu")
CAPTION = "A red ball falls."
SIZE = ClipSize(frames=9, height=32, width=32)
STEP = 1
"""Which of the three steps of sampling is looked at."""


def draw(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root, live = tmp_path_factory.mktemp("cosmos"), {}
    for name in ("cosmos", "cosmos_25"):
        folder = TWINS[name][1](root / name)
        spec = plugins.description("backbones", name)(weights=str(folder))
        live[name] = spec.load(("transformer", "vae", "text_encoder"), CPU)
    return live


@dataclass
class Continued:
    """One step of the stock pipeline's continuation of a clip's first frames."""

    live: Any
    opening: Opening
    video: torch.Tensor
    inputs: dict[str, Any]
    clean: torch.Tensor

    @property
    def noisy(self) -> torch.Tensor:
        return self.inputs["hidden_states"].transpose(1, 2)


@pytest.fixture(
    scope="module",
    params=[("cosmos", 1), ("cosmos", 2), ("cosmos_25", 1), ("cosmos_25", 2)],
    ids=str,
)
def continued(request, backbones: dict[str, Any]) -> Continued:
    name, shown = request.param
    live = backbones[name]
    video = torch.rand(1, SIZE.frames, 3, SIZE.height, SIZE.width, generator=draw(1))
    video = (video * 255.0).round() / 255.0
    frames = [
        Image.fromarray((frame * 255.0).round().byte().permute(1, 2, 0).numpy())
        for frame in video[0, : frames_of(shown, 4)]
    ]
    settings = Generation(**live.spec.generation).changed(steps=3, guidance_scale=1.0)
    pipeline = live.pipeline()
    pipeline.set_progress_bar_config(disable=True)
    scheduler, seen = pipeline.scheduler, {"inputs": [], "steps": []}
    real = scheduler.step

    def step(velocity: torch.Tensor, timestep: Any, sample: torch.Tensor, **more: Any) -> Any:
        seen["steps"].append((velocity, sample))
        return real(velocity, timestep, sample, **more)

    def watch(module: Any, args: Any, inputs: dict[str, Any]) -> None:
        seen["inputs"].append(inputs)

    handle = live.transformer.register_forward_pre_hook(watch, with_kwargs=True)
    scheduler.step = step
    pipeline(
        prompt=CAPTION,
        generator=draw(3),
        output_type="latent",
        **live.sampling(SIZE, settings),
        **live.continuing(frames),
    )
    handle.remove()
    scheduler.step = real
    velocity, sample = seen["steps"][STEP]
    clean = sample - scheduler.sigmas[STEP] * velocity
    inputs = {key: x for key, x in seen["inputs"][STEP].items() if key != "return_dict"}
    return Continued(live, Opening((shown,)), video, inputs, clean.transpose(1, 2))


def test_frames_are_told_as_the_stock_pipelines_tell_them(continued: Continued) -> None:
    live, noisy = continued.live, continued.noisy
    timestep = 1000 * continued.inputs["timestep"].flatten()[-1:]
    ours = live.inputs(noisy, live.encode_text([CAPTION]), timestep)
    ours = live.shown(ours, noisy, continued.opening)
    theirs = dict(continued.inputs)
    if hasattr(live.transformer, "crossattn_proj"):
        theirs["encoder_hidden_states"] = live.transformer.crossattn_proj(
            theirs["encoder_hidden_states"]
        )
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        torch.testing.assert_close(ours[name], expected, msg=lambda text, n=name: f"{n}: {text}")


def test_latents_that_are_shown_are_the_clips_own(continued: Continued) -> None:
    live, (shown,) = continued.live, continued.opening.latents
    # Predict2's pipeline draws from the posterior, 2.5's takes its mode.
    drawn = draw(3) if live.spec.name == "cosmos" else None
    own = live.latents(live.encode_video(continued.video), drawn)
    torch.testing.assert_close(own[:, :shown], continued.noisy[:, :shown], rtol=1e-4, atol=1e-4)


def test_loss_and_predicted_latents_are_the_stock_schedulers(continued: Continued) -> None:
    """Clean latents and noise are chosen so that they mix to the sample that the pipeline had."""
    live, noisy, (shown,) = continued.live, continued.noisy, continued.opening.latents
    share = continued.inputs["timestep"].flatten()[-1].item()
    clean = torch.randn(noisy.shape, generator=draw(4))
    clean[:, :shown] = noisy[:, :shown]
    noise = (noisy - (1 - share) * clean) / share
    outputs: list[torch.Tensor] = []

    def keep(module: Any, args: Any, output: tuple[torch.Tensor]) -> None:
        output[0].retain_grad()
        outputs.append(output[0])

    live.transformer.proj_out.requires_grad_(True)
    handle = live.transformer.register_forward_hook(keep)
    text, timestep = live.encode_text([CAPTION]), torch.tensor([1000 * share])
    denoised = live.denoising_loss(clean, text, noise, timestep, continued.opening)
    handle.remove()
    expected = continued.clean[:, shown:]
    torch.testing.assert_close(denoised.clean[:, shown:], expected, rtol=1e-3, atol=1e-4)
    assert torch.equal(denoised.clean[:, :shown], clean[:, :shown])
    loss = ((expected - clean[:, shown:]) / share).square().mean()
    torch.testing.assert_close(denoised.loss, loss[None], rtol=1e-3, atol=1e-4)
    (denoised.loss.sum() + denoised.clean.sum()).backward()
    live.transformer.proj_out.requires_grad_(False)
    live.transformer.zero_grad()
    (output,) = outputs
    assert output.grad is not None
    assert not output.grad[:, :, :shown].any() and output.grad[:, :, shown:].all()


def test_noise_levels_are_as_predict2_was_trained(backbones: dict[str, Any]) -> None:
    live = backbones["cosmos"]
    share = live.sample_timesteps(torch.zeros(4000, 1, 1, 1, 1), draw(0)) / 1000
    assert share.median().item() == pytest.approx(24**0.5 / (1 + 24**0.5), abs=0.02)
    rare = share > 200 / 201
    assert rare.float().mean().item() == pytest.approx(0.05, abs=0.01)
    assert share.max() < 1


def test_defaults_are_as_the_authors_train(backbones: dict[str, Any]) -> None:
    spec, newer = backbones["cosmos"].spec, backbones["cosmos_25"].spec
    data = Data.model_validate({"manifest": "clips.csv", "cache": "cache", **SIZE.model_dump()})
    assert spec.continuation(data).latents == (1, 2) and newer.continuation(data) is None
    with pytest.raises(UserError, match="no text mode"):
        spec.continuation(data.model_copy(update={"condition": Continuation(probability=0.5)}))


def test_torchvision_is_asked_for_where_diffusers_needs_it(
    backbones: dict[str, Any], monkeypatch
) -> None:
    from diffusers.models.transformers import transformer_cosmos

    monkeypatch.delattr(transformer_cosmos, "transforms")
    spec = backbones["cosmos"].spec
    with pytest.raises(UserError, match="pip install torchvision"):
        spec.load(("transformer",), CPU)
    spec.load(("vae", "text_encoder"), CPU)


def test_text_is_stored_after_the_projection(backbones: dict[str, Any]) -> None:
    live = backbones["cosmos_25"]
    text = live.encode_text([CAPTION])
    raw, _ = live.stock.encode_prompt(CAPTION, do_classifier_free_guidance=False)
    assert raw.shape[-1] == 48 and text["encoder_hidden_states"].shape[-1] == 16
    noisy, timestep = torch.randn(1, 3, 4, 4, 4, generator=draw(1)), torch.tensor([500.0])
    stock = type(live.transformer).from_pretrained(live.spec.folder(), subfolder="transformer")
    answers = [
        model(**live.inputs(noisy, given, timestep), return_dict=False)[0]
        for model, given in (
            (live.transformer, text),
            (live.transformer, {"encoder_hidden_states": raw}),
            (stock, {"encoder_hidden_states": raw}),
        )
    ]
    for answer in answers[:2]:
        torch.testing.assert_close(answer, answers[2])
    live = live.spec.load(("transformer",), CPU)
    published = [layer.clone() for layer in live.transformer.crossattn_proj.parameters()]
    live.reinitialise(0)
    for fresh, layer in zip(live.transformer.crossattn_proj.parameters(), published, strict=True):
        assert torch.equal(fresh, layer)


def test_a_model_in_the_hubs_cache_has_its_weights(
    backbones: dict[str, Any], tmp_path: Path, monkeypatch
) -> None:
    spec = backbones["cosmos_25"].spec
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    absent = type(spec)(weights="someone/not-here")
    assert absent.weight_files() == []
    with pytest.raises(UserError, match="someone/not-here is not on this machine"):
        absent.fingerprint()
    repository = tmp_path / "models--someone--twin"
    shutil.copytree(spec.folder(), repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    cached = type(spec)(weights="someone/twin")
    (file,) = cached.weight_files()
    assert file.is_relative_to(repository) and cached.fingerprint() == spec.fingerprint()


def test_guardrail_s_place_is_taken_without_its_package(
    backbones: dict[str, Any], tmp_path: Path
) -> None:
    checker = backbones["cosmos_25"].components()["safety_checker"]
    checker.to(CPU)
    assert checker.check_text_safety("anything")
    assert checker.check_video_safety(tmp_path) is tmp_path
