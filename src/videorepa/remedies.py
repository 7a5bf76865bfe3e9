"""What makes a verb take less memory, the cheapest first: what to change where it lacks some."""

from __future__ import annotations

import torch

from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.sections import Data, Generation

FEWER_CLIPS = "fewer --clips, which are held in main memory"


def in_training(recipe: Recipe, device: torch.device, processes: int) -> list[str]:
    """What the recipe's training does not save yet."""
    memory, optim, lora = recipe.memory, recipe.optim, recipe.train.lora
    clips = optim.batch_size * optim.accumulate
    rounded = [
        choice
        for choice in ("float8", "nf4")
        if memory.frozen in ("auto", "float32", "bfloat16")
        and _trains(recipe, f"memory.frozen={choice}")
    ]
    every = {
        "memory.gradient_checkpointing: true, a third more work for the same result": (
            not memory.checkpoints(1)
        ),
        f"optim.batch_size: 1 with optim.accumulate: {clips}, the same result to rounding": (
            optim.batch_size > 1
            and not recipe.mixes_samples
            and _trains(recipe, "optim.batch_size=1", f"optim.accumulate={clips}")
        ),
        "memory.offload_activations: true, the same result more slowly, by way of main memory": (
            not memory.offload_activations
            and device.type != "cpu"
            and _trains(recipe, "memory.offload_activations=true")
        ),
        f"memory.frozen: {' or '.join(rounded)}, which rounds the frozen weights": bool(rounded),
        "memory.optimizer: adamw8bit, which rounds the moments": (
            memory.optimizer == "adamw" and _trains(recipe, "memory.optimizer=adamw8bit")
        ),
        "parallel.engine: fsdp2, by which each process keeps a shard": (
            processes > 1
            and (recipe.parallel is None or recipe.parallel.engine != "fsdp2")
            and _trains(recipe, "parallel.engine=fsdp2")
        ),
        "memory.offload: group, more slowly, by way of main memory": (
            memory.offload == "none"
            and device.type != "cpu"
            and _trains(recipe, "memory.offload=group")
        ),
        "no `validation`; generate clips afterwards": recipe.validation is not None,
        "train.lora in place of all weights, another experiment": lora is None,
    }
    return [*(remedy for remedy, helps in every.items() if helps), _smaller(recipe.data)]


def _trains(recipe: Recipe, *overrides: str) -> bool:
    """Whether the recipe can be changed so. Other settings may be in the way."""
    if recipe.speed.compile and {"memory.frozen=float8", "memory.offload=group"} & {*overrides}:
        return False  # The training refuses it, which alone knows the weights' format.
    try:
        recipe.override(*overrides)
    except UserError:
        return False
    return True


def in_encoding(recipe: Recipe) -> list[str]:
    """What `prepare` and the measurements on the recipe's clips do not save yet."""
    every = {
        "data.prepare_batch: 1, the same result to rounding": recipe.data.prepare_batch > 1,
        "backbone.tiling: true, which changes latents a little and needs a cache of its own": (
            not recipe.backbone.tiling
        ),
    }
    return [*(remedy for remedy, helps in every.items() if helps), _smaller(recipe.data)]


def in_sampling(settings: Generation, offload: str, device: torch.device) -> list[str]:
    """What `generate` does not save yet."""
    is_gpu = device.type != "cpu"
    every = {
        "--offload model, which keeps one model at a time on the GPU": is_gpu and offload == "none",
        "--offload group, which keeps one layer there and takes longer": (
            is_gpu and offload != "group"
        ),
        "generation.tiling: true, which decodes in pieces": not settings.tiling,
    }
    return [
        *(remedy for remedy, helps in every.items() if helps),
        "fewer frames or a smaller size, which gives other clips",
    ]


def in_teaching() -> list[str]:
    """What `head` does not save yet."""
    return [FEWER_CLIPS, "a smaller encoder, or fewer of its encoder.frames"]


def in_scoring() -> list[str]:
    """What helps a judge."""
    return [
        "no other process on the device; each --shard needs one of its own",
        "--set precision=auto, where it was float32",
        "a device with more memory: the judge has to fit",
    ]


def _smaller(data: Data) -> str:
    return (
        f"fewer frames than data.frames: {data.frames}, or a smaller size than "
        f"{data.height}x{data.width}, with a cache of its own"
    )
