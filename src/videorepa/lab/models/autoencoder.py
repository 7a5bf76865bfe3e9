"""Trains the lab's video autoencoder, an AutoencoderKLCogVideoX of 4x in time and 4x in space.

Trained on whole clips from the start, a small causal autoencoder learns the background and blurs
whatever moves. So training begins with single frames cropped around the bodies, continues with
short crops, and ends with whole clips. Errors weigh more where a frame has strong colours, which
only bodies have.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import Field

from videorepa.lab.models.training import train
from videorepa.settings.bounds import AtOnce, Frames, Number, Seed, Side, Width
from videorepa.settings.section import Section
from videorepa.system.device import autocast, compute_dtype
from videorepa.world.contact import unlabelled_clip
from videorepa.world.render import make_clip
from videorepa.world.scenarios import HELD_OUT_SEED
from videorepa.world.simulator import FRAMES, SIZE

CPU = torch.device("cpu")

STRONG = 0.2
"""Range of a pixel's channels, in [0, 1], above which the pixel counts as a body's."""


class Stage(Section):
    """A stage of the curriculum.

    Attributes:
        frames: Number of frames in a crop: 1, or a multiple of 8 plus 1.
        size: Side of a crop in pixels.
        batch: Number of crops in a step.
    """

    steps: Number
    frames: Annotated[Frames, Field(le=FRAMES)]
    size: Annotated[Side, Field(le=SIZE)]
    batch: AtOnce


class AutoencoderRecipe(Section):
    """The recipe of the micro autoencoder.

    Attributes:
        start: An autoencoder to continue from. By default the training starts from scratch.
        decoder_only: Freeze the encoder, so that latents, and models trained on them, stay valid.
        foreground_weight: Weight in the loss of a body's pixel. Other pixels have weight 1.
        kl_weight: Weight of the posterior's KL divergence.
    """

    out: Path
    start: Path | None = None
    decoder_only: bool = False
    channels: tuple[Width, ...] = Field(default=(16, 32, 64), min_length=1)
    latent_channels: Width = 8
    stages: tuple[Stage, ...] = (
        Stage(steps=2000, frames=1, size=32, batch=24),
        Stage(steps=2000, frames=9, size=32, batch=4),
        Stage(steps=1000, frames=FRAMES, size=SIZE, batch=1),
    )
    learning_rate: float = Field(default=2e-3, gt=0)
    foreground_weight: float = 3.0
    kl_weight: float = 1e-6
    seed: Seed = 0


def _crops(recipe: AutoencoderRecipe, stage: Stage, step: int) -> tuple[np.ndarray, np.ndarray]:
    """A batch of crops (B, F, h, w, 3) in [0, 1] and their pixels' weights (B, F, h, w, 1)."""
    rng = np.random.default_rng([recipe.seed, stage.frames, step])
    # Drawing a clip takes as long as training on a few of its frames.
    per_clip = max(1, FRAMES // 3 // stage.frames)
    crops = []
    for item in range(stage.batch):
        if item % per_clip == 0:
            clip = _clip(recipe.seed, step * stage.batch + item)
            ys, xs = np.nonzero((np.ptp(clip, axis=-1) > STRONG * 255).any(0))
        first = rng.integers(FRAMES - stage.frames + 1)
        pick = rng.integers(len(xs))
        target = np.array([xs[pick], ys[pick]]) + rng.uniform(-8, 8, 2)
        left, top = np.clip(target - stage.size / 2, 0, SIZE - stage.size).astype(int)
        crop = clip[first:, top:, left:][: stage.frames, : stage.size, : stage.size]
        crops.append(crop.astype(np.float32) / 255.0)
    batch = np.stack(crops)
    weights = 1.0 + (recipe.foreground_weight - 1.0) * (np.ptp(batch, axis=-1) > STRONG)
    return batch, weights[..., None].astype(np.float32)


def _clip(seed: int, number: int) -> np.ndarray:
    """A training clip. Every fourth is of the kind that teachers and the contact probe see."""
    return unlabelled_clip(seed, number) if number % 4 == 3 else make_clip(seed, number).frames


def _to_model(frames: np.ndarray) -> torch.Tensor:
    """(B, F, h, w, C) to (B, C, F, h, w)."""
    return torch.from_numpy(np.ascontiguousarray(frames.transpose(0, 4, 1, 2, 3)))


@torch.no_grad()
def reconstruction(vae: Any, clips: int = 24) -> dict[str, float]:
    """Measure how well held-out clips are reconstructed.

    Returns:
        The PSNR in dB, -10 log10(MSE) for pixels in [0, 1], of all pixels (psnr) and of those of
        bodies (psnr_objects), and the latents' standard deviation (latent_std).
    """
    errors, object_errors, latents = [], [], []
    for index in range(clips):
        frames = make_clip(HELD_OUT_SEED, index).frames[None].astype(np.float32) / 255.0
        video = _to_model(frames) * 2 - 1
        with autocast(CPU, compute_dtype("auto", CPU)):
            mean = vae.encode(video).latent_dist.mode()
            decoded = vae.decode(mean).sample
        error = ((decoded.float().clamp(-1, 1) - video) / 2) ** 2
        mask = torch.from_numpy(np.ptp(frames[0], axis=-1) > STRONG)
        errors.append(error.mean().item())
        object_errors.append(error[0, :, mask].mean().item())
        latents.append(mean.float())
    return {
        "psnr": -10 * math.log10(np.mean(errors)),
        "psnr_objects": -10 * math.log10(np.mean(object_errors)),
        "latent_std": torch.cat(latents).std().item(),
    }


def train_autoencoder(recipe: AutoencoderRecipe) -> dict[str, float]:
    """Train the autoencoder, write it to `recipe.out` as a diffusers folder in bfloat16, and
    measure it with `reconstruction`.

    A stopped training resumes from its last checkpoint, in a folder beside `recipe.out`.
    """
    torch.manual_seed(recipe.seed)
    vae = _new(recipe) if recipe.start is None else _load(recipe.start)
    vae.encoder.requires_grad_(not recipe.decoder_only)
    trained = [parameter for parameter in vae.parameters() if parameter.requires_grad]
    stages = [stage for stage in recipe.stages for _ in range(stage.steps)]

    def loss(step: int) -> torch.Tensor:
        frames, weight = _crops(recipe, stages[step], step)
        video = _to_model(frames) * 2 - 1
        with autocast(CPU, compute_dtype("auto", CPU)):
            posterior = vae.encode(video).latent_dist
            decoded = vae.decode(posterior.sample()).sample.float()
        error = decoded - video
        squared = ((error**2 + 0.05 * error.abs()) * _to_model(weight)).mean()
        return squared + recipe.kl_weight * posterior.kl().mean()

    train(
        vae,
        torch.optim.AdamW(trained, recipe.learning_rate, weight_decay=0.0),
        loss,
        steps=len(stages),
        rate=lambda progress: (
            recipe.learning_rate * (0.02 + 0.98 * math.cos(progress * math.pi / 2))
        ),
        out=recipe.out,
        seed=recipe.seed,
    )
    measured = reconstruction(vae)
    if not recipe.decoder_only:
        # Diffusion expects latents of about unit variance.
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
        # Start with little noise in the posterior, since much would drown the bodies' few pixels.
        out = vae.encoder.conv_out.conv
        out.weight[recipe.latent_channels :] *= 0.01
        out.bias[recipe.latent_channels :] = -8.0
    return vae


def _load(folder: Path) -> Any:
    from diffusers import AutoencoderKLCogVideoX

    vae: Any = AutoencoderKLCogVideoX.from_pretrained(folder)
    return vae.float()
