"""Assembles the lab's models: first a pipeline to train, then the models that the package ships."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

from videorepa.backbones._micro import widened
from videorepa.lab.models.text_encoder import TEXT_TOKENS
from videorepa.settings.bounds import Layers, Seed, Side, Width
from videorepa.settings.section import Section
from videorepa.system.files import atomic_write
from videorepa.world.simulator import FRAMES


class AssembleRecipe(Section):
    """The recipe of the pipeline.

    Attributes:
        parts: The folder that holds `tokenizer`, `text_encoder` and `vae`.
        out: The pipeline's folder, which is replaced.
        start: A transformer with the initial weights. By default they are random.
        from_image: Give the transformer channels for an image, whose weights are 0, and write a
            pipeline that continues an image.
    """

    parts: Path
    out: Path
    start: Path | None = None
    from_image: bool = False
    layers: Layers = 6
    heads: Layers = 8
    head_width: Width = 32
    patch: Side = 4
    seed: Seed = 0


def assemble(recipe: AssembleRecipe) -> dict[str, float]:
    """Write a CogVideoX pipeline and count its transformer's parameters, in millions."""
    from diffusers import (
        AutoencoderKLCogVideoX,
        CogVideoXDPMScheduler,
        CogVideoXImageToVideoPipeline,
        CogVideoXPipeline,
        CogVideoXTransformer3DModel,
    )
    from transformers import AutoTokenizer, T5EncoderModel

    tokenizer: Any = AutoTokenizer.from_pretrained(recipe.parts / "tokenizer")
    text_encoder = T5EncoderModel.from_pretrained(recipe.parts / "text_encoder")
    vae: Any = AutoencoderKLCogVideoX.from_pretrained(recipe.parts / "vae")
    side = vae.config.sample_height // 2 ** (len(vae.config.block_out_channels) - 1)
    torch.manual_seed(recipe.seed)
    transformer: Any = CogVideoXTransformer3DModel(
        num_attention_heads=recipe.heads,
        attention_head_dim=recipe.head_width,
        in_channels=vae.config.latent_channels,
        out_channels=vae.config.latent_channels,
        time_embed_dim=128,
        text_embed_dim=text_encoder.config.d_model,
        num_layers=recipe.layers,
        sample_width=side,
        sample_height=side,
        sample_frames=FRAMES,
        patch_size=recipe.patch,
        max_text_seq_length=TEXT_TOKENS,
        spatial_interpolation_scale=1.0,
    )
    if recipe.start is not None:
        # Only the weights, since captions may be longer than that transformer's configuration says.
        older: Any = CogVideoXTransformer3DModel.from_pretrained(recipe.start)
        transformer.load_state_dict(older.state_dict())
    if recipe.from_image:
        transformer = widened(transformer)
    # CogVideoX's schedule without its SNR shift, which is meant for large frames.
    scheduler = CogVideoXDPMScheduler(
        snr_shift_scale=1.0,
        rescale_betas_zero_snr=True,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        beta_start=0.00085,
        beta_end=0.0120,
        beta_schedule="scaled_linear",
        set_alpha_to_one=True,
    )
    shutil.rmtree(recipe.out, ignore_errors=True)
    kind = CogVideoXImageToVideoPipeline if recipe.from_image else CogVideoXPipeline
    pipeline = kind(tokenizer, text_encoder, vae, transformer, scheduler)
    pipeline.save_pretrained(recipe.out)
    # The parts' own files, in their own dtype: pipelines of the same parts share a cache.
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(recipe.parts / part, recipe.out / part, dirs_exist_ok=True)
    return {"parameters_millions": sum(p.numel() for p in transformer.parameters()) / 1e6}


class ShipRecipe(Section):
    """The recipe of the models that the package ships.

    Attributes:
        run: The base model's run.
        vae: Its autoencoder, perhaps with a better decoder.
        teacher: The VideoMAE's folder.
        teacher_layers: Number of the teacher's first blocks to keep, since its last ones predict
            pixels. By default all are kept.
        image_teacher: The DINOv2's folder.
        out: Gets the folders `cogvideox`, `videomae` and `dinov2`. It is replaced.
    """

    run: Path
    vae: Path
    teacher: Path
    teacher_layers: Layers | None = None
    image_teacher: Path
    out: Path


def ship(recipe: ShipRecipe) -> dict[str, float]:
    """Write the models that the package ships, in bfloat16, and sum their weights' megabytes."""
    from diffusers import AutoencoderKLCogVideoX
    from transformers import Dinov2Model, VideoMAEModel

    from videorepa.artifacts.run import Run

    parts = ("transformer", "vae", "text_encoder")
    backbone = Run.open(recipe.run).backbone(parts, torch.device("cpu"), torch.float32)
    pipeline = backbone.pipeline()
    vae: Any = AutoencoderKLCogVideoX.from_pretrained(recipe.vae)
    pipeline.register_modules(vae=vae)
    shutil.rmtree(recipe.out, ignore_errors=True)
    pipeline.to(torch.bfloat16).save_pretrained(recipe.out / "cogvideox")
    teacher: Any = VideoMAEModel.from_pretrained(recipe.teacher)
    teacher.encoder.layer = teacher.encoder.layer[: recipe.teacher_layers]
    teacher.config.num_hidden_layers = len(teacher.encoder.layer)
    teacher.to(torch.bfloat16).save_pretrained(recipe.out / "videomae")
    image_teacher: Any = Dinov2Model.from_pretrained(recipe.image_teacher)
    image_teacher.to(torch.bfloat16).save_pretrained(recipe.out / "dinov2")
    for path in recipe.out.rglob("config.json"):
        # Drop the trainer's path.
        config = json.loads(path.read_text(encoding="utf-8"))
        config.pop("_name_or_path", None)
        atomic_write(path, json.dumps(config, indent=2) + "\n")
    sizes = [path.stat().st_size for path in recipe.out.rglob("*.safetensors")]
    return {"megabytes": sum(sizes) / 1e6}
