"""Trains the lab's video autoencoder, an AutoencoderKLCogVideoX of 4x in time and 4x in space.

From scratch on whole clips a small causal autoencoder learns the background and blurs what moves.
So it starts on single frames cut out around the objects, then short crops, then whole clips, and
the squared error counts more where a frame differs from the empty room.
"""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videorepa.device import autocast, compute_dtype
from videorepa.lab.render import EMPTY_ROOM, make_clip
from videorepa.lab.world import FRAMES, SIZE
from videorepa.recipe import Section

CPU = torch.device("cpu")
HELD_OUT_SEED = 1_000_003
"""Clips of this seed are never trained on; checks are calibrated on them."""


class Stage(Section):
    """A part of the curriculum: crops of `frames` frames and `size` pixels, `batch` at a time,
    for the given share of the time. `frames` is 1 or a multiple of 8 plus 1."""

    share: float
    frames: int
    size: int
    batch: int


class AutoencoderRecipe(Section):
    """How the micro autoencoder is made. The budget is in minutes, since what a CPU reaches in a
    given time is what counts here; the number of steps done is written beside the weights.

    decoder_of: an autoencoder to go on from, training its decoder alone: its latents, and models
    trained on them, stay valid.
    """

    out: Path
    decoder_of: Path | None = None
    minutes: float = 35.0
    channels: tuple[int, ...] = (16, 32, 64)
    latent_channels: int = 8
    stages: tuple[Stage, ...] = (
        Stage(share=0.45, frames=1, size=32, batch=24),
        Stage(share=0.35, frames=9, size=32, batch=6),
        Stage(share=0.20, frames=FRAMES, size=SIZE, batch=2),
    )
    learning_rate: float = 2e-3
    foreground_weight: float = 3.0
    kl_weight: float = 1e-6
    seed: int = 0


def _crops(recipe: AutoencoderRecipe, stage: Stage, step: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of crops and their weights, both (B, F, h, w, .), floats in [0, 1]."""
    rng = np.random.default_rng([recipe.seed, stage.frames, step])
    crops, weights = [], []
    for item in range(stage.batch):
        clip = make_clip(recipe.seed, step * stage.batch + item)
        first = rng.integers(FRAMES - stage.frames + 1)
        frames = clip.frames[first : first + stage.frames]
        middle = clip.trajectory.positions[first + stage.frames // 2]
        target = middle[rng.integers(len(middle))] + rng.uniform(-8, 8, 2)
        left, top = np.clip(target - stage.size / 2, 0, SIZE - stage.size).astype(int)
        window = np.s_[top : top + stage.size, left : left + stage.size]
        crop = frames[:, window[0], window[1]].astype(np.float32) / 255.0
        moved = np.abs(crop - EMPTY_ROOM[window]).max(-1, keepdims=True) > 0.02
        crops.append(crop)
        weights.append(1.0 + (recipe.foreground_weight - 1.0) * moved)
    return np.stack(crops), np.stack(weights).astype(np.float32)


def _to_model(frames: np.ndarray) -> torch.Tensor:
    """(B, F, h, w, C) to (B, C, F, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 4, 1, 2, 3)))


@torch.no_grad()
def measure(vae: Any, clips: int = 24) -> dict[str, float]:
    """Reconstruction of held-out clips: PSNR in dB over all pixels and where objects are, and the
    latents' standard deviation."""
    errors, object_errors, latents = [], [], []
    for index in range(clips):
        frames = make_clip(HELD_OUT_SEED, index).frames[None].astype(np.float32) / 255.0
        video = _to_model(frames) * 2 - 1
        with autocast(CPU, compute_dtype("auto", CPU)):
            mean = vae.encode(video).latent_dist.mode()
            decoded = vae.decode(mean).sample
        error = ((decoded.float().clamp(-1, 1) - video) / 2) ** 2
        mask = torch.from_numpy(np.abs(frames[0] - EMPTY_ROOM).max(-1) > 0.02)
        errors.append(error.mean().item())
        object_errors.append(error[0, :, mask].mean().item())
        latents.append(mean.float())
    return {
        "psnr": -10 * math.log10(np.mean(errors)),
        "psnr_objects": -10 * math.log10(np.mean(object_errors)),
        "latent_std": torch.cat(latents).std().item(),
    }


def train_autoencoder(recipe: AutoencoderRecipe) -> dict[str, float]:
    """Train, write a diffusers folder to `recipe.out` in bf16 and return what was measured."""
    torch.manual_seed(recipe.seed)
    vae = _new(recipe) if recipe.decoder_of is None else _with_frozen_encoder(recipe.decoder_of)
    for parameter in vae.parameters():
        if parameter.dim() == 5:
            parameter.data = parameter.contiguous(memory_format=torch.channels_last_3d)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=0.0)
    start, step, budget = time.monotonic(), 0, recipe.minutes * 60
    for number, stage in enumerate(recipe.stages):
        end = budget * sum(s.share for s in recipe.stages[: number + 1])
        while (elapsed := time.monotonic() - start) < end:
            progress = elapsed / budget
            for group in optimizer.param_groups:
                warm = min(1.0, (step + 1) / 100)
                group["lr"] = (
                    recipe.learning_rate * warm * (0.02 + 0.98 * math.cos(progress * math.pi / 2))
                )
            frames, weight = _crops(recipe, stage, step)
            video = (_to_model(frames) * 2 - 1).contiguous(memory_format=torch.channels_last_3d)
            with autocast(CPU, compute_dtype("auto", CPU)):
                posterior = vae.encode(video).latent_dist
                decoded = vae.decode(posterior.sample()).sample.float()
            error = decoded - video
            loss = ((error**2 + 0.05 * error.abs()) * _to_model(weight)).mean()
            loss = loss + recipe.kl_weight * posterior.kl().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            step += 1
            if step % 200 == 0:
                print(
                    f"{elapsed / 60:5.1f} min  stage {number + 1}  step {step}  "
                    f"loss {loss.item():.4f}",
                    flush=True,
                )
                vae.save_pretrained(recipe.out.with_name(recipe.out.name + "-unfinished"))
    measured = measure(vae) | {"steps": float(step), "minutes": (time.monotonic() - start) / 60}
    if recipe.decoder_of is None:
        # Diffusion expects latents of about unit spread.
        vae.register_to_config(scaling_factor=round(1.0 / measured["latent_std"], 5))
    vae.to(torch.bfloat16).save_pretrained(recipe.out)
    return measured


def _new(recipe: AutoencoderRecipe) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    kind: Any = AutoencoderKLCogVideoX
    vae = kind(
        block_out_channels=recipe.channels,
        down_block_types=("CogVideoXDownBlock3D",) * len(recipe.channels),
        up_block_types=("CogVideoXUpBlock3D",) * len(recipe.channels),
        latent_channels=recipe.latent_channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_height=SIZE,
        sample_width=SIZE,
        scaling_factor=1.0,
    )
    with torch.no_grad():
        # A posterior that starts almost without noise: otherwise it drowns the objects' few pixels.
        out = vae.encoder.conv_out.conv
        out.weight[recipe.latent_channels :] *= 0.01
        out.bias[recipe.latent_channels :] = -8.0
    return vae


def _with_frozen_encoder(folder: Path) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    vae: Any = AutoencoderKLCogVideoX.from_pretrained(folder)
    vae.encoder.requires_grad_(False)
    return vae.float()
