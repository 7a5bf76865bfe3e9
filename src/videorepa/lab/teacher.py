"""Trains the lab's teacher: a small VideoMAE that fills in masked tubes of simulated clips."""

from __future__ import annotations

import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from videorepa.encoders import IMAGENET_MEAN, IMAGENET_STD
from videorepa.lab.render import make_clip
from videorepa.recipe import Section

TEACHER_FRAMES = 16


class TeacherRecipe(Section):
    """How the micro teacher is made. It sees clips at half size, as VideoREPA's teacher sees all
    frames at a third of theirs. mask: share of tubes hidden, the same ones in every frame."""

    out: Path
    minutes: float = 20.0
    size: int = 32
    patch: int = 8
    width: int = 192
    layers: int = 6
    heads: int = 6
    mask: float = 0.75
    batch: int = 32
    learning_rate: float = 1e-3
    seed: int = 0


def train_teacher(recipe: TeacherRecipe) -> dict[str, float]:
    """Train, write a transformers folder in bf16 and return steps, minutes and the last loss."""
    from transformers import VideoMAEConfig, VideoMAEForPreTraining

    torch.manual_seed(recipe.seed)
    config = VideoMAEConfig(
        image_size=recipe.size,
        patch_size=recipe.patch,
        num_frames=TEACHER_FRAMES,
        tubelet_size=2,
        hidden_size=recipe.width,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        intermediate_size=4 * recipe.width,
        decoder_hidden_size=96,
        decoder_num_hidden_layers=2,
        decoder_num_attention_heads=3,
        decoder_intermediate_size=384,
        # Normalised targets would blow up the noise of empty patches, which are most of a clip.
        norm_pix_loss=False,
        use_mean_pooling=True,
        layer_norm_eps=1e-6,
    )
    model: Any = VideoMAEForPreTraining(config)
    optimizer = torch.optim.AdamW(
        model.parameters(), recipe.learning_rate, betas=(0.9, 0.95), weight_decay=0.05
    )
    side = recipe.size // recipe.patch
    steps_in_time = TEACHER_FRAMES // 2
    visible = side * side - round(recipe.mask * side * side)
    mean = torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    std = torch.tensor(IMAGENET_STD).view(3, 1, 1)
    start, step, recent = time.monotonic(), 0, []
    while (elapsed := time.monotonic() - start) < recipe.minutes * 60:
        rate = min(1.0, (step + 1) / 200) * (
            0.5 + 0.5 * math.cos(math.pi * elapsed / recipe.minutes / 60)
        )
        for group in optimizer.param_groups:
            group["lr"] = recipe.learning_rate * rate
        clips = [
            make_clip(recipe.seed, step * recipe.batch + i).frames[1:] for i in range(recipe.batch)
        ]
        video = torch.from_numpy(np.stack(clips)).permute(0, 1, 4, 2, 3).float() / 255
        small = F.interpolate(video.flatten(0, 1), (recipe.size,) * 2, mode="bicubic")
        pixels = (small.unflatten(0, video.shape[:2]) - mean) / std
        shown = torch.rand(recipe.batch, side * side).argsort(1)[:, :visible]
        mask = torch.ones(recipe.batch, side * side, dtype=torch.bool).scatter_(1, shown, False)
        loss = model(pixels, bool_masked_pos=mask.repeat(1, steps_in_time)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        recent = [*recent[-49:], loss.item()]
        if step % 200 == 0:
            print(f"{elapsed / 60:5.1f} min  step {step}  loss {np.mean(recent):.4f}", flush=True)
    model.videomae.to(torch.bfloat16).save_pretrained(recipe.out)
    return {
        "steps": float(step),
        "minutes": (time.monotonic() - start) / 60,
        "loss": float(np.mean(recent)),
    }
