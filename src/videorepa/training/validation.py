"""Generates validation clips during training and measures how far they drift."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from videorepa.artifacts.run import Run
from videorepa.data.video import read_all, write_video
from videorepa.errors import ClipError
from videorepa.recipe import Recipe
from videorepa.training.drift import Drift, Look, look
from videorepa.training.parallel import Alone
from videorepa.training.student import Student


def validation(
    recipe: Recipe, run: Run, student: Student, workers: Alone, resumed: bool
) -> Callable[[int], dict[str, float]]:
    """Generates the recipe's validation clips at a step, at fixed seeds, and says for the log how
    they differ from the base model's; does nothing where the recipe has none.

    The base model's clips are made here, as those of step 0, unless a resumed run has them.
    """
    if recipe.validation is None:
        return lambda step: {}
    from videorepa.backbones._sampler import Sampler, noise_seed

    prompts = recipe.validation.prompts
    helper = recipe.backbone.load(("vae", "text_encoder"), workers.device)
    sampler = Sampler(helper, recipe.data, recipe.generation, student.transformer)

    def path(step: int, number: int) -> Path:
        return run.samples / f"step-{step:08d}" / f"{number:02d}.mp4"

    def seen(step: int) -> list[Look]:
        # The files are measured, so that a resumed run finds the base's clips as they were.
        return [look(read_all(path(step, number))[0]) for number in range(len(prompts))]

    def sample(step: int) -> None:
        student.transformer.eval()
        for number, prompt in enumerate(prompts):
            is_own = number % workers.count == workers.rank
            # Where the model is sharded, none could sample by itself.
            if is_own or workers.is_sharded:
                clip = sampler.sample(prompt, noise_seed(prompt, 0))
                if is_own:
                    path(step, number).parent.mkdir(parents=True, exist_ok=True)
                    write_video(path(step, number), clip, recipe.generation.fps)
        student.transformer.train()
        workers.wait()

    base: list[Look] = []
    if resumed and workers.is_first:
        with suppress(ClipError):  # Deleted, or damaged.
            base = seen(0)
    if not workers.broadcast(len(base)):
        sample(0)
        base = seen(0) if workers.is_first else []
    drift = Drift(base, recipe.validation.drift)

    def validate(step: int) -> dict[str, float]:
        sample(step)
        return drift(step, seen(step)) if workers.is_first else {}

    return validate
