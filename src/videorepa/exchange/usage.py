"""Says how plain diffusers samples from an export as `generate` samples from the run."""

from __future__ import annotations

import json
from typing import Any

import torch

from videorepa.backbones import ONE_TILE
from videorepa.exchange.lora import LORA_FILE
from videorepa.recipe import Recipe


def sampled_with(recipe: Recipe) -> str:
    """Say in a line which scheduler and settings `generate` samples with by default."""
    settings, size = recipe.generation, recipe.data
    about = recipe.backbone.load((), torch.device("cpu")).scheduler_about()
    own = ", ".join(f"{key} {value}" for key, value in about["scheduler_settings"].items())
    return "; ".join(
        [
            f"{about['scheduler']} ({own or 'its defaults'})",
            f"{settings.steps} steps",
            f"guidance {settings.guidance_scale:g}"
            + (", growing while the noise falls" if settings.dynamic_guidance else ""),
            f"negative prompt {settings.negative_prompt!r}"
            if settings.negative_prompt
            else "no negative prompt",
            f"{size.frames} frames of {size.height}x{size.width} at {settings.fps} a second",
        ]
    )


def usage(recipe: Recipe, product: str, part: str) -> str:
    """Write Python that samples with plain diffusers as `generate` does, in the export's folder.

    Args:
      recipe: The run's recipe.
      product: The LoRA's file for diffusers, or the transformer's folder.
      part: The part of the base model's pipeline that the product is for.
    """
    spec, settings = recipe.backbone, recipe.generation
    dtype = torch.float32 if recipe.train.precision == "float32" else torch.bfloat16
    live = spec.load((), torch.device("cpu"), dtype)
    scheduler, options = live.scheduler_class()
    arguments = live.sampling(recipe.data, settings)
    # A model that is trained from images continues one, also if it has a text mode.
    takes_image = spec.continuation(recipe.data) is not None
    pipeline = spec.stock_image_pipeline if takes_image else spec.stock_pipeline
    classes, parts, then = [pipeline], {}, []
    if product != LORA_FILE:
        classes.append(spec.transformer_class)
        source = f'"{product}", torch_dtype={dtype}'
        parts[part] = f"{spec.transformer_class}.from_pretrained({source})"
    elif spec.lora_pipeline != spec.pipeline_class:
        source = f'".", weight_name="{product}", use_safetensors=True'
        then.append(f"pipe.{part}.load_lora_adapter({source})")
    else:
        into = "" if part == "transformer" else f", load_into_{part}=True"
        then.append(f'pipe.load_lora_weights("{product}"{into})')
    if options or scheduler != spec.config("model_index").get("scheduler", ("", scheduler))[1]:
        classes.append(scheduler)
        given = "".join(f", {key}={_literal(value)}" for key, value in options.items())
        then.append(f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{given})")
    if settings.tiling and max(recipe.data.height, recipe.data.width) > ONE_TILE:
        then.append("pipe.vae.enable_tiling()")
    if "guidance_scale" not in arguments:
        then.append(f"pipe.guider = pipe.guider.new(guidance_scale={settings.guidance_scale})")
    shown = {}
    if takes_image:
        frame, loaded = "first-frame.png", 'load_image("first-frame.png")'
        continuing = live.continuing([frame]).items()
        shown = {name: repr(value).replace(repr(frame), loaded) for name, value in continuing}
    of_pipeline = str(dtype)
    if live.vae_dtype != dtype:
        of_pipeline = f'{{"default": {dtype}, "vae": {live.vae_dtype}}}'
    remark = "  # As on GPUs; CPUs may compute in float32." if dtype == torch.bfloat16 else ""
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {', '.join(sorted(classes))}",
            *(["from diffusers.utils import load_image"] if takes_image else []),
            "",
            f"pipe = {pipeline}.from_pretrained(",
            f"    {_literal(spec.source)},",
            *(f"    {name}={value}," for name, value in parts.items()),
            f"    torch_dtype={of_pipeline},{remark}",
            ")",
            *then,
            'prompt, seed = "A ball falls.", 0  # A clip\'s sidecar holds both.',
            "frames = pipe(",
            *(f"    {name}={value}," for name, value in shown.items()),
            "    prompt=prompt,",
            "    generator=torch.Generator().manual_seed(seed),",
            *(f"    {name}={_literal(value)}," for name, value in arguments.items()),
            '    output_type="np",',
            ").frames[0]",
        ]
    )


def _literal(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)
