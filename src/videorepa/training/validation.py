"""Generates validation clips during training and measures how far they drift."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import torch

from videorepa.artifacts.run import Run
from videorepa.backbones import Text
from videorepa.data.image import read_image
from videorepa.data.video import read_all, write_video
from videorepa.errors import ClipError
from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype
from videorepa.system.progress import console
from videorepa.training.drift import Appearance, Drift, appearance
from videorepa.training.parallel import Alone
from videorepa.training.student import Student


def encoded_prompts(recipe: Recipe, workers: Alone) -> dict[str, Text]:
    """Encode the recipe's validation prompts, if any, into main memory.

    Call it before the student is loaded, so that the device holds one of them at a time.
    """
    if recipe.validation is None or not recipe.validation.prompts:
        return {}
    from videorepa.backbones._sampler import encode_prompts

    prompts = recipe.validation.prompts
    dtype = compute_dtype(recipe.train.precision, workers.device)
    coder = recipe.backbone.load(("text_encoder",), workers.device, dtype)
    note = coder.cut_note("validation prompts", {prompt: prompt for prompt in prompts})
    if note and workers.is_first:
        console.print(note)
    return encode_prompts(coder, prompts, recipe.generation, _images(recipe))


def _images(recipe: Recipe) -> list[Any]:
    """The images that the clips of the prompts continue, PIL images; none without them."""
    assert recipe.validation is not None
    size = recipe.data
    return [read_image(path, size.height, size.width) for path in recipe.validation.images]


def validation(
    recipe: Recipe,
    run: Run,
    student: Student,
    workers: Alone,
    texts: Mapping[str, Text],
    resumed: bool,
) -> Callable[[int], dict[str, float]]:
    """Generate the base model's clips, as those of step 0, unless a resumed run has them.

    Between validations the autoencoder waits in main memory, as does a second transformer that the
    pipeline needs, which stays there and is brought to the device layer by layer.

    Args:
      recipe: Its `validation` has the prompts; the seeds are fixed.
      run: Its `samples` folder gets the clips.
      student: Still the base model.
      workers: The processes that divide the clips among them.
      texts: What `encoded_prompts` gives.
      resumed: Whether the run goes on from a checkpoint.

    Returns:
      A function that generates a step's clips and gives their drift for the log. All processes call
      it. Where the recipe has no validation prompts it does nothing.
    """
    if recipe.validation is None or not recipe.validation.prompts:
        return lambda step: {}
    from videorepa.backbones._sampler import Sampler, noise_seed

    prompts, images = recipe.validation.prompts, _images(recipe)
    shown = [[image] for image in images] or [[] for _ in prompts]
    coder = recipe.backbone.load(("vae", "image_encoder"), torch.device("cpu"), student.dtype)
    coder.device = workers.device
    offload = "none" if workers.device.type == "cpu" else "group"
    size, settings = recipe.data, recipe.generation
    sampler = Sampler(
        coder, size, settings, texts, student.transformer, offload, from_image=bool(images)
    )

    def measured(step: int) -> list[Appearance]:
        # From the files, so that a resumed run measures the base's clips in the same way.
        paths = (run.sample_path(step, number) for number in range(len(prompts)))
        return [appearance(read_all(path)[0]) for path in paths]

    def sample(step: int) -> None:
        with workers.sampling(student):
            sample_own(step)
        workers.wait()

    def sample_own(step: int) -> None:
        student.transformer.eval()
        for first in range(0, len(prompts), workers.parts):
            number = first + workers.part
            if number < len(prompts):
                seed = noise_seed(prompts[number], 0)
                clip = sampler.sample(prompts[number], seed, shown[number])
                if workers.rank % workers.context == 0:
                    run.sample_path(step, number).parent.mkdir(parents=True, exist_ok=True)
                    write_video(run.sample_path(step, number), clip, settings.fps)
            elif workers.is_sharded:
                # The others need this process's shards for their last clips.
                sampler.accompany(prompts[first], shown[first])
        student.transformer.train()

    base: list[Appearance] = []
    if resumed and workers.is_first:
        with suppress(ClipError):  # The clips were deleted or damaged.
            base = measured(0)
    if not workers.broadcast(len(base)):
        sample(0)
        base = measured(0) if workers.is_first else []
    drift = Drift(base, recipe.validation.drift)

    def validate(step: int) -> dict[str, float]:
        sample(step)
        return drift(step, measured(step)) if workers.is_first else {}

    return validate
