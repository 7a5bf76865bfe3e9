"""Generates validation clips during training and measures how far they drift."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

from videorepa.artifacts.run import Run
from videorepa.data.video import read_all, write_video
from videorepa.errors import ClipError
from videorepa.recipe import Recipe
from videorepa.system.progress import console
from videorepa.training.drift import Appearance, Drift, appearance
from videorepa.training.parallel import Alone
from videorepa.training.student import Student


def validation(
    recipe: Recipe, run: Run, student: Student, workers: Alone, resumed: bool
) -> Callable[[int], dict[str, float]]:
    """Generate the base model's clips, as those of step 0, unless a resumed run has them.

    Args:
      recipe: Its `validation` has the prompts; the seeds are fixed.
      run: Its `samples` folder gets the clips.
      student: Still the base model.
      workers: The processes that divide the clips among them.
      resumed: Whether the run goes on from a checkpoint.

    Returns:
      A function that generates a step's clips and gives their drift for the log. All processes call
      it. Where the recipe has no validation it does nothing.
    """
    if recipe.validation is None:
        return lambda step: {}
    from videorepa.backbones._sampler import Sampler, noise_seed

    prompts = recipe.validation.prompts
    coder = recipe.backbone.load(("vae", "text_encoder"), workers.device)
    note = coder.cut_note("validation prompts", {prompt: prompt for prompt in prompts})
    if note and workers.is_first:
        console.print(note)
    sampler = Sampler(coder, recipe.data, recipe.generation, student.transformer)

    def measured(step: int) -> list[Appearance]:
        # From the files, so that a resumed run measures the base's clips in the same way.
        paths = (run.sample_path(step, number) for number in range(len(prompts)))
        return [appearance(read_all(path)[0]) for path in paths]

    def sample(step: int) -> None:
        student.transformer.eval()
        for number, prompt in enumerate(prompts):
            is_own = number % workers.count == workers.rank
            # No process can sample a sharded model by itself.
            if is_own or workers.is_sharded:
                clip = sampler.sample(prompt, noise_seed(prompt, 0))
                if is_own:
                    run.sample_path(step, number).parent.mkdir(parents=True, exist_ok=True)
                    write_video(run.sample_path(step, number), clip, recipe.generation.fps)
        student.transformer.train()
        workers.wait()

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
