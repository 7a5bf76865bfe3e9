"""Fine-tunes a video diffusion model while a frozen video encoder's relations are distilled in."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from videorepa import checkpoint
from videorepa.backbones import Backbone
from videorepa.checkpoint import Checkpoint, put
from videorepa.data.batches import clip_index, generator, sample_numbers, step_seed
from videorepa.data.cache import Cache
from videorepa.data.source import Item, open_source
from videorepa.data.video import read_all
from videorepa.device import compute_dtype
from videorepa.drift import Drift, Look, look
from videorepa.encoders import EncoderSpec
from videorepa.errors import ClipError, UserError
from videorepa.inspect import inspect
from videorepa.memory import make_optimizer
from videorepa.parallel import Alone, place
from videorepa.progress import console, track
from videorepa.recipe import Optim, Recipe
from videorepa.run import Run
from videorepa.student import Batch, Student
from videorepa.tokens import TokenGrid
from videorepa.trackers import trackers


def train(recipe: Recipe, out: Path, *, device: str | None = None) -> Run:
    """Train as the recipe says, into the folder `out`; a run that is there already goes on.

    The result does not depend on interruptions: order, noise and timesteps are functions of the
    seed and the sample's number. Raises UserError for a folder that holds something else, a cache
    that does not fit, and a loss that is not finite, with the step named.
    """
    inspect(recipe)  # Refuses what cannot work, before anything is made.
    workers = place(recipe, device)
    run, found = _begin(recipe, out, workers)
    start = found.step if found else 0
    student = Student(recipe, workers.device)
    # First, while the student still is the base model.
    validate = _validation(recipe, run, student, workers, resumed=found is not None)
    training = _Training(recipe, workers, student, found)
    clips = _Clips(recipe, student.backbone, workers.device)
    write_log = [run.log, *trackers(recipe, run, start)] if workers.is_first else []
    optim = recipe.optim

    begun, seen = time.monotonic(), 0
    with student.tapped():
        batches = _ahead(clips.batch(number) for number in _sample_numbers(recipe, start, workers))
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


def schedule(optim: Optim, step: int) -> float:
    """The learning rate's factor at a step: linear warm-up, then as the recipe says, to 0."""
    if step < optim.warmup_steps:
        return (step + 1) / optim.warmup_steps
    progress = (step - optim.warmup_steps) / max(1, optim.steps - optim.warmup_steps)
    if optim.schedule == "linear":
        return 1.0 - progress
    if optim.schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * progress)
    return 1.0


class _Training:
    """The student, shared by all processes, with its optimiser and the averages of its weights.

    found: the checkpoint to go on from.
    """

    def __init__(
        self, recipe: Recipe, workers: Alone, student: Student, found: Checkpoint | None
    ) -> None:
        self.recipe, self.workers, self.student = recipe, workers, student
        if found is not None:
            student.load(found)
        optimizer = make_optimizer(recipe, [*student.trained.values(), *student.terms.parameters()])
        # From here on parameters can be shares of what they were.
        self.model = workers.share(student, optimizer, student.block_classes())
        self.optimizer = optimizer
        self.trained = student.trained
        self.ema: dict[str, Tensor] | None = None
        if recipe.train.ema is not None:
            self.ema = {key: value.detach().clone() for key, value in self.trained.items()}
        if found is not None:
            self._take_up(found)

    def _take_up(self, found: Checkpoint) -> None:
        if self.ema is not None:
            wanted = {key: self.workers.whole(value) for key, value in self.ema.items()}
            put(found.ema or {}, wanted)
            for key, value in wanted.items():
                self.ema[key].copy_(self.workers.sharded_like(value, self.ema[key]))
        self.workers.load_optimizer_state(self.optimizer, found.optimizer)

    def clip_gradients(self) -> Tensor:
        """Scale gradients to the recipe's norm; gives what it was."""
        limit = self.recipe.optim.max_grad_norm
        together, apart = self.student.terms.clipped()
        for probe in apart:
            self.workers.clip_gradients(probe, limit)
        return self.workers.clip_gradients([*self.trained.values(), *together], limit)

    def update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.workers.step(self.optimizer)
        decay = self.recipe.train.ema
        if self.ema is not None and decay is not None:
            for key, value in self.trained.items():
                self.ema[key].lerp_(value.detach(), 1 - decay)

    def state(self, step: int) -> Checkpoint:
        """All of it, whole, on the first process; all of them have to ask."""
        collected = self.workers.collected
        return Checkpoint(
            step,
            collected(self.trained),
            collected(self.student.terms.state_dict()),
            self.workers.optimizer_state(self.optimizer),
            None if self.ema is None else collected(self.ema),
            self.student.terms.memory(),
            self.recipe.optim.clips(self.workers.count),
        )


class _Clips:
    """Turns sample numbers into batches, from the cache and from teachers that are online."""

    def __init__(self, recipe: Recipe, backbone: Backbone, device: torch.device) -> None:
        self.recipe, self.backbone, self.device = recipe, backbone, device
        self.source = open_source(recipe.data)
        self.cache = Cache(recipe)
        dtype = compute_dtype(recipe.train.precision, device)
        self.online = {
            term.encoder: term.encoder.load(device, dtype)
            for term in recipe.terms.values()
            if term.encoder and term.encoder not in recipe.stored_encoders
        }
        self.items = self.cache.ready(self.source.items)
        self.place = {item.id: index for index, item in enumerate(self.source.items)}
        self.empty = self.cache.read_empty_caption()

    def batch(self, numbers: range) -> Batch:
        seed = self.recipe.seed
        latents, noises, texts, times, grids = [], [], [], [], []
        for number in numbers:
            item = self.items[clip_index(seed, number, len(self.items))]
            draw = generator(seed, "sample", number)
            moments, text = self.cache.read_clip(item)
            clean = self.backbone.latents(moments[None], draw)
            noises.append(torch.randn(clean.shape, generator=draw))
            times.append(self.backbone.sample_timesteps(clean, draw))
            dropped = torch.rand((), generator=draw).item() < self.recipe.train.caption_dropout
            latents.append(clean)
            texts.append(self.empty if dropped else text)
            grids.append(self._teachers(item))
        return Batch(
            torch.cat(latents).to(self.device),
            {name: torch.stack([t[name] for t in texts]).to(self.device) for name in texts[0]},
            torch.cat(noises).to(self.device),
            torch.cat(times).to(self.device),
            {encoder: self._stacked([grid[encoder] for grid in grids]) for encoder in grids[0]},
        )

    def _stacked(self, grids: list[TokenGrid]) -> TokenGrid:
        return TokenGrid.batch(grids).to(self.device)

    def _teachers(self, item: Item) -> dict[EncoderSpec, TokenGrid]:
        stored = {
            encoder: self.cache.read_features(item, encoder) for encoder in self.cache.features
        }
        if not self.online:
            return stored
        try:
            frames = self.source.frames(self.place[item.id])
        except ClipError as error:
            raise UserError(
                f"The clip {item.id!r} can no longer be read ({error}), and the teacher is online. "
                "Run `videorepa prepare` again, or set align.teacher to cached."
            ) from None
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255.0
        return stored | {spec: encoder(video) for spec, encoder in self.online.items()}


def _sample_numbers(recipe: Recipe, start: int, workers: Alone) -> Iterator[range]:
    optim = recipe.optim
    for step in range(start, optim.steps):
        for micro in range(optim.accumulate):
            yield sample_numbers(
                step, micro, workers.rank, workers.count, optim.batch_size, optim.accumulate
            )


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each read in a thread while the one before is trained on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


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


def _validation(
    recipe: Recipe, run: Run, student: Student, workers: Alone, resumed: bool
) -> Callable[[int], dict[str, float]]:
    """Generates the recipe's validation clips at a step, at fixed seeds, and says for the log how
    they differ from the base model's; does nothing where the recipe has none.

    The base model's clips are made here, as those of step 0, unless a resumed run has them.
    """
    if recipe.validation is None:
        return lambda step: {}
    from videorepa.generate import Sampler, noise_seed

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
                    sampler.write(path(step, number), clip)
        student.transformer.train()
        workers.wait()

    base: list[Look] = []
    if resumed and workers.is_first:
        with suppress(ClipError):  # Deleted, or damaged.
            base = seen(0)
    if not workers.told(len(base)):
        sample(0)
        base = seen(0) if workers.is_first else []
    drift = Drift(base, recipe.validation.drift)

    def validate(step: int) -> dict[str, float]:
        sample(step)
        return drift(step, seen(step)) if workers.is_first else {}

    return validate
