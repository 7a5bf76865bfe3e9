"""Fine-tunes a video diffusion model while a frozen video encoder's relations are distilled in."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from statistics import fmean

import torch
from torch import Tensor

from videorepa.align.contract import MEETING, check, met_otherwise
from videorepa.artifacts import checkpoint
from videorepa.artifacts.checkpoint import Checkpoint
from videorepa.artifacts.run import Run
from videorepa.data.loader import Loader, PreparedClips
from videorepa.errors import UserError, within_memory
from videorepa.recipe import Recipe
from videorepa.remedies import in_training
from videorepa.settings.sections import Optim
from videorepa.system.device import deterministic, peak_memory
from videorepa.system.lock import sole_user
from videorepa.system.progress import console, track
from videorepa.system.randomness import step_seed
from videorepa.system.stopping import Terminated, postponed
from videorepa.system.wording import listed
from videorepa.training.context import check_context
from videorepa.training.extras import check_extras
from videorepa.training.pace import Pace
from videorepa.training.parallel import Alone, join_workers
from videorepa.training.plausibility import encoded_pairs, plausibility
from videorepa.training.profiling import check_profiled, profiled
from videorepa.training.state import Training, schedule
from videorepa.training.student import Student
from videorepa.training.trackers import trackers
from videorepa.training.validation import encoded_prompts, validation

_STOP = "stop"
"""Stands among a step's measurements, which the processes share anyway."""


def train(recipe: Recipe, out: Path, *, device: str | None = None, profile: int = 0) -> Run:
    """Train as the recipe says, into the folder `out`, or resume the run that is there.

    The result does not depend on interruptions: order, noise and timesteps are functions of the
    seed and the sample's number. Ctrl-C and SIGTERM end it after the running step, with a
    checkpoint.

    Args:
      recipe: Describes the run. Its cache must have been prepared.
      out: The run's folder.
      device: Where to train; by default the first GPU, or the CPU.
      profile: How many steps, after the first, to profile into the run's folder.

    Raises:
      UserError: The folder holds something else or is in use, the cache does not fit the recipe or
        its clips, the run began with other clips, the recipe cannot work, or a loss or gradient is
        not finite, in which case the message names the step.
    """
    check(recipe)  # Both refuse what cannot work, before anything is made.
    check_extras(recipe)
    check_context(recipe)
    workers = join_workers(recipe, device)
    remedies = in_training(recipe, workers.device, workers.count)
    with (
        sole_user(out) if workers.is_first else nullcontext(),
        within_memory(remedies),
        deterministic(recipe.train.deterministic),
    ):
        return _train(recipe, out, workers, profile)


def _train(recipe: Recipe, out: Path, workers: Alone, profile: int) -> Run:
    prepared = PreparedClips(recipe, shown=workers.is_first)
    run, resumed = _begin(recipe, out, workers, prepared)
    start = resumed.step if resumed else 0
    steps = range(start, recipe.optim.steps)
    check_profiled(profile, steps)
    texts = encoded_prompts(recipe, workers)
    pairs = encoded_pairs(recipe, workers)
    student = Student(recipe, workers.device, home=workers.home)
    training = Training(recipe, workers, student)
    # Both ask the base model first, so they come before the checkpoint is loaded.
    validate = validation(recipe, run, student, workers, texts, resumed is not None)
    ask = plausibility(recipe, student, workers, pairs)
    if resumed:
        training.resume(resumed)
        del resumed  # It is as large as all that is trained, three times over.
    loader = Loader(recipe, prepared, student.backbone, workers.device)
    write_log = [run.append, *trackers(recipe, run, start)] if workers.is_first else []
    optim = recipe.optim
    profiling = profiled(run, profile if workers.is_first else 0, steps)
    pace = Pace(recipe, workers, start)

    with postponed(workers.is_first) as request, student.tapped(), profiling as profile_step:
        batches = loader.batches(start, workers.part, workers.parts)
        for step in track(steps, "train", done=start, shown=workers.is_first):
            pace.begin_step()
            torch.manual_seed(step_seed(recipe.seed, step, workers.part))
            measured: list[dict[str, Tensor]] = []
            for micro in range(optim.accumulate):
                batch = next(batches)
                with workers.accumulating(training.model, is_last=micro + 1 == optim.accumulate):
                    denoised, aligned = training.model(step, batch)
                    denoise = denoised.loss.mean()
                    ((denoise + aligned.loss) / optim.accumulate).backward()
                measured.append({"denoise": denoise.detach(), **aligned.measured()})
            norm = training.clip_gradients()
            rate = optim.learning_rate * schedule(optim, step)
            training.update(rate)

            done, is_last = step + 1, step + 1 == optim.steps
            stop = torch.full_like(denoise, float(request.interrupt is not None))
            means = _read(workers, measured, {"grad_norm": norm, _STOP: stop})
            is_stopped = means.pop(_STOP) > 0  # All processes see it after the same step.
            _check_finite(step, run, means)
            student.terms.watch(means)
            record = {
                "step": done,
                "loss": aligned.weighted(means),
                **means,
                **aligned.weights,
                "lr": rate,
                **pace.of_step(done),
                "memory_gb": peak_memory(workers.device) / 1e9,
            }
            if recipe.validation and (is_last or done % recipe.validation.every == 0):
                record |= validate(done) | ask()
            for write in write_log:
                write(record)
            is_regular = is_last or done % recipe.train.checkpoint_every == 0
            if is_regular or is_stopped:
                state = training.state(done)
                if workers.is_first:
                    keep = recipe.train.keep_checkpoints
                    checkpoint.save(run.checkpoints, state, keep, between=not is_regular)
            if is_stopped:
                request.interrupt = request.interrupt or Terminated()
                break
            profile_step()
        workers.wait()
    return run


def _begin(
    recipe: Recipe, out: Path, workers: Alone, prepared: PreparedClips
) -> tuple[Run, Checkpoint | None]:
    """Open the run's folder, with the checkpoint to resume from if there is one.

    The first process makes the folder, chooses the checkpoint, and cuts from the log the steps that
    will be repeated. The others take over its choice.
    """
    if not workers.is_first:
        step = workers.broadcast(0)
        run = Run.open(out)
        return run, checkpoint.at(run.checkpoints, step) if step else None
    run = Run.begin(out, recipe)
    resumed = run.newest()
    run.record_clips(prepared.contents, resumed is not None)
    if prepared.failed:
        console.print(f"{prepared.failures}. The training goes without them.")
    run.cut_log(resumed.step if resumed else 0)
    checkpoint.tidy(run.checkpoints, resumed.step if resumed else 0, recipe.train.keep_checkpoints)
    if resumed:
        _check_batch(recipe.optim, resumed, workers)
        _check_meeting(recipe, resumed)
        console.print(f"Going on from step {resumed.step} of {recipe.optim.steps}.")
    workers.broadcast(resumed.step if resumed else 0)
    return run, resumed


def _check_batch(optim: Optim, resumed: Checkpoint, workers: Alone) -> None:
    batch = optim.clips(workers.parts)
    if resumed.batch not in (None, batch):
        raise UserError(
            f"The run's steps have {resumed.batch} clips, and {workers.count} processes with "
            f"optim.batch_size {optim.batch_size} and optim.accumulate {optim.accumulate} make "
            f"{batch}. Change these so that their product stays {resumed.batch}."
        )


def _check_meeting(recipe: Recipe, resumed: Checkpoint) -> None:
    changed = met_otherwise(recipe, check(recipe)) if resumed.meeting < MEETING else []
    if changed:
        raise UserError(
            "The run was begun by an earlier version, which compared other frames in the "
            f"alignment {listed(changed)}: it left out the student's first step, or took "
            "CogVideoX 1.5's latents for those of earlier frames. Train anew in another folder "
            "with --out, or go on with that version."
        )


def _read(
    workers: Alone, measured: list[dict[str, Tensor]], once: dict[str, Tensor]
) -> dict[str, float]:
    """Average a step's values over its micro-batches and over the processes.

    The device is waited for here, and nowhere else in a step.

    Args:
      workers: The processes.
      measured: The scalars of each micro-batch.
      once: Scalars that a step has once.
    """
    # Norms of shards that are kept in main memory are there too.
    scalars = [
        value.to(workers.device, torch.float32)
        for each in (*measured, once)
        for value in each.values()
    ]
    values = iter(workers.mean(torch.stack(scalars)).tolist())
    rows = [[next(values) for _ in each] for each in measured]
    means = dict(zip(measured[0], map(fmean, zip(*rows, strict=True)), strict=True))
    return means | dict(zip(once, values, strict=True))


def _check_finite(step: int, run: Run, means: dict[str, float]) -> None:
    losses = {k: v for k, v in means.items() if k.startswith(("denoise", "align", "grad_norm"))}
    names = [name for name, value in losses.items() if not math.isfinite(value)]
    if names:
        listing = ", ".join(f"{name} {value}" for name, value in losses.items())
        raise UserError(
            f"Step {step + 1}: {' and '.join(names)} not finite ({listing}). The training has "
            f"stopped; the checkpoints in {run.checkpoints} are from earlier steps. Lower "
            "optim.learning_rate, or check the data."
        )
