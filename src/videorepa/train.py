"""Fine-tunes a video diffusion model while a frozen video encoder's relations are distilled in."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from videorepa.align.contract import check
from videorepa.artifacts import checkpoint
from videorepa.artifacts.checkpoint import Checkpoint
from videorepa.artifacts.run import Run
from videorepa.data.loader import Loader, read_ahead
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.sections import Optim
from videorepa.system.progress import console, track
from videorepa.system.randomness import step_seed
from videorepa.training.parallel.launch import join_workers
from videorepa.training.parallel.workers import Alone
from videorepa.training.state import Training, numbers_by_step, schedule
from videorepa.training.student import Student
from videorepa.training.trackers import trackers
from videorepa.training.validation import validation


def train(recipe: Recipe, out: Path, *, device: str | None = None) -> Run:
    """Train as the recipe says, into the folder `out`; a run that is there already goes on.

    The result does not depend on interruptions: order, noise and timesteps are functions of the
    seed and the sample's number. Raises UserError for a folder that holds something else, a cache
    that does not fit, and a loss that is not finite, with the step named.
    """
    check(recipe)  # Refuses what cannot work, before anything is made.
    workers = join_workers(recipe, device)
    run, found = _begin(recipe, out, workers)
    start = found.step if found else 0
    student = Student(recipe, workers.device)
    # First, while the student still is the base model.
    validate = validation(recipe, run, student, workers, resumed=found is not None)
    training = Training(recipe, workers, student, found)
    clips = Loader(recipe, student.backbone, workers.device)
    write_log = [run.append, *trackers(recipe, run, start)] if workers.is_first else []
    optim = recipe.optim

    begun, seen = time.monotonic(), 0
    with student.tapped():
        batches = read_ahead(
            clips.batch(number) for number in numbers_by_step(recipe, start, workers)
        )
        for step in track(range(start, optim.steps), "train", done=start, shown=workers.is_first):
            torch.manual_seed(step_seed(recipe.seed, step, workers.rank))
            measured: list[dict[str, float]] = []
            for micro in range(optim.accumulate):
                batch = next(batches)
                with workers.passing(training.model, is_last=micro + 1 == optim.accumulate):
                    denoised, aligned = training.model(step, batch)
                    denoise = denoised.loss.mean()
                    _check_finite(step, run, denoise=denoise, **aligned.losses)
                    workers.backward((denoise + aligned.loss) / optim.accumulate)
                loss = denoise.item() + aligned.counted
                measured.append({"loss": loss, "denoise": denoise.item(), **aligned.read()})
                seen += len(batch.latents) * workers.count
            norm = training.clip_gradients()
            _check_finite(step, run, gradient=norm)
            rate = optim.learning_rate * schedule(optim, step)
            training.update(rate)

            values = workers.mean({key: _mean(m[key] for m in measured) for key in measured[0]})
            student.terms.watch(values)
            record = {
                "step": step + 1,
                **values,
                "grad_norm": norm.item(),
                "lr": rate,
                "clips_per_second": seen / (time.monotonic() - begun),
                "memory_gb": _memory_gb(workers.device),
            }
            last = step + 1 == optim.steps
            if recipe.validation and (last or (step + 1) % recipe.validation.every == 0):
                record |= validate(step + 1)
            for write in write_log:
                write(record)
            if last or (step + 1) % recipe.train.checkpoint_every == 0:
                state = training.state(step + 1)
                if workers.is_first:
                    checkpoint.save(run.checkpoints, state, recipe.train.keep_checkpoints)
    workers.wait()
    return run


def _begin(recipe: Recipe, out: Path, workers: Alone) -> tuple[Run, Checkpoint | None]:
    """The run's folder, and the checkpoint to go on from. The first process makes the folder, cuts
    from the log what will be done again, and says which checkpoint it is; the others follow."""
    if not workers.is_first:
        step = workers.told(0)
        run = Run.open(out)
        return run, checkpoint.at(run.checkpoints, step) if step else None
    run = Run.begin(out, recipe)
    found = run.newest()
    run.cut_log(found.step if found else 0)
    if found:
        _check_batch(recipe.optim, found, workers)
        console.print(f"Going on from step {found.step} of {recipe.optim.steps}.", markup=False)
    workers.told(found.step if found else 0)
    return run, found


def _check_batch(optim: Optim, found: Checkpoint, workers: Alone) -> None:
    batch = optim.clips(workers.count)
    if found.batch not in (None, batch):
        raise UserError(
            f"The run's steps have {found.batch} clips, and {workers.count} processes with "
            f"optim.batch_size {optim.batch_size} and optim.accumulate {optim.accumulate} make "
            f"{batch}. Change these so that their product stays {found.batch}."
        )


def _check_finite(step: int, run: Run, **values: Tensor) -> None:
    bad = [name for name, value in values.items() if not torch.isfinite(value)]
    if bad:
        said = ", ".join(f"{name} {value.item()}" for name, value in values.items())
        raise UserError(
            f"Step {step + 1}: {' and '.join(bad)} not finite ({said}). Stopped; the checkpoints "
            f"in {run.checkpoints} are from before. Lower optim.learning_rate, or check the data."
        )


def _mean(values: Iterator[float]) -> float:
    found = list(values)
    return sum(found) / len(found)


def _memory_gb(device: torch.device) -> float:
    """Peak memory so far: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
