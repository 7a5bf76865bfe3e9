"""Fine-tunes a video diffusion model while a frozen video encoder's relations are distilled in."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from videorepa import checkpoint
from videorepa.backbones import Backbone, add_lora
from videorepa.data.batches import clip_index, generator, sample_numbers
from videorepa.data.cache import Cache
from videorepa.data.source import Item, open_source
from videorepa.device import autocast, compute_dtype, pick_device
from videorepa.diffusion import Denoised
from videorepa.encoders import EncoderSpec
from videorepa.errors import ClipError, UserError
from videorepa.inspect import inspect
from videorepa.progress import console, track
from videorepa.recipe import Optim, Recipe
from videorepa.run import Run
from videorepa.terms import Aligned, Terms
from videorepa.tokens import TokenGrid


def train(recipe: Recipe, out: Path, *, device: str | None = None) -> Run:
    """Train as the recipe says, into the folder `out`; a run that is there already goes on.

    The result does not depend on interruptions: order, noise and timesteps are functions of the
    seed and the sample's number. Raises UserError for a folder that holds something else, a cache
    that does not fit, and a loss that is not finite, with the step named.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "Training runs in one process so far; several would write over each other in "
            f"{out}. Start it without a launcher, and raise optim.accumulate instead."
        )
    inspect(recipe)  # Refuses what cannot work, before anything is made.
    run = Run.begin(out, recipe)
    student, start = _resume(recipe, run, pick_device(device))
    clips = _Clips(recipe, student.backbone, student.device)
    optim = recipe.optim
    trackers = _trackers(recipe, run, start)
    validate = _validation(recipe, run, student)

    begun, seen = time.monotonic(), 0
    with student.terms.tapped(student.backbone):
        batches = _ahead(clips.batch(number) for number in _sample_numbers(recipe, start))
        for step in track(range(start, optim.steps), "train", done=start):
            torch.manual_seed(stable_step_seed(recipe, step))
            rate = optim.learning_rate * schedule(optim, step)
            measured: list[dict[str, float]] = []
            for _ in range(optim.accumulate):
                batch = next(batches)
                with autocast(student.device, student.dtype):
                    denoised = student.denoise(batch)
                    aligned = student.align(step, batch, denoised)
                denoise = denoised.loss.mean()
                _check_finite(step, run, denoise=denoise, **aligned.losses)
                ((denoise + aligned.loss) / optim.accumulate).backward()
                loss = denoise.item() + aligned.counted
                measured.append({"loss": loss, "denoise": denoise.item(), **aligned.read()})
                seen += len(batch.latents)
            norm = student.terms.clip_gradients(list(student.trained.values()), optim.max_grad_norm)
            _check_finite(step, run, gradient=norm)
            student.update(rate)

            values = {key: _mean(m[key] for m in measured) for key in measured[0]}
            student.terms.watch(values)
            record = {
                "step": step + 1,
                **values,
                "grad_norm": norm.item(),
                "lr": rate,
                "clips_per_second": seen / (time.monotonic() - begun),
                "memory_gb": _memory_gb(student.device),
            }
            run.log(record)
            for write in trackers:
                write(record)
            last = step + 1 == optim.steps
            if last or (step + 1) % recipe.train.checkpoint_every == 0:
                checkpoint.save(
                    run.checkpoints, student.state(step + 1), recipe.train.keep_checkpoints
                )
            if recipe.validation and (last or (step + 1) % recipe.validation.every == 0):
                validate(step + 1)
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


@dataclass(frozen=True)
class Batch:
    """All that one micro-batch needs, on the training device. teachers: features by encoder."""

    latents: Float[Tensor, "b f c h w"]
    text: Float[Tensor, "b l d"]
    noise: Float[Tensor, "b f c h w"]
    timestep: Int[Tensor, " b"]
    teachers: dict[EncoderSpec, TokenGrid]


class _Student:
    """The transformer, the alignment terms beside it, and their optimiser."""

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.dtype = compute_dtype(recipe.train.precision, device)
        storage = torch.float32
        if recipe.train.lora is not None and recipe.train.precision == "bfloat16":
            storage = torch.bfloat16
        self.backbone: Backbone = recipe.backbone.load(("transformer",), device, storage)
        transformer = self.backbone.transformer
        if storage == torch.bfloat16 != self.dtype:
            # Held in half the memory, computed with in float32. Layers that diffusers leaves out of
            # the casting (norms, embeddings, the last projection) are few: they are float32.
            transformer.enable_layerwise_casting(storage_dtype=storage, compute_dtype=self.dtype)
            for module in transformer.modules():
                if not hasattr(module, "_diffusers_hook"):
                    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
                    for tensor in own:
                        tensor.data = tensor.data.to(self.dtype)
            self.backbone.dtype = self.dtype
        transformer.train()
        if recipe.train.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()

        torch.manual_seed(stable_step_seed(recipe, -1))
        if recipe.train.lora is None:
            transformer.requires_grad_(True)
        else:
            add_lora(transformer, recipe.train.lora)
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.trained = {k: p for k, p in transformer.named_parameters() if p.requires_grad}
        self.terms = Terms(recipe, recipe.backbone.shapes(recipe.data)).to(device)
        optim = recipe.optim
        self.optimizer = torch.optim.AdamW(
            [*self.trained.values(), *self.terms.parameters()],
            optim.learning_rate,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        self.ema: dict[str, Tensor] | None = None
        if recipe.train.ema is not None:
            self.ema = {key: value.detach().clone() for key, value in self.trained.items()}

    def denoise(self, batch: Batch) -> Denoised:
        return self.backbone.denoising_loss(batch.latents, batch.text, batch.noise, batch.timestep)

    def align(self, step: int, batch: Batch, denoised: Denoised) -> Aligned:
        """The alignment terms of the batch that was just denoised."""
        frames = self.recipe.data.frames
        return self.terms(step, self.backbone, batch.latents, denoised, batch.teachers, frames)

    def update(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        decay = self.recipe.train.ema
        if self.ema is not None and decay is not None:
            for key, value in self.trained.items():
                self.ema[key].lerp_(value.detach(), 1 - decay)

    def state(self, step: int) -> checkpoint.Checkpoint:
        return checkpoint.Checkpoint(
            step,
            {key: value.detach() for key, value in self.trained.items()},
            self.terms.state_dict(),
            self.optimizer.state_dict(),
            self.ema,
            self.terms.memory(),
        )

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Take up a checkpoint. Raises UserError if it is of another model."""
        for ours, theirs in (
            (self.trained, found.trained),
            (self.terms.state_dict(), found.projector),
            (self.ema or {}, found.ema or {}),
        ):
            unlike = ours.keys() ^ theirs.keys() or {
                key for key in ours if ours[key].shape != theirs[key].shape
            }
            if unlike:
                raise UserError(
                    f"The checkpoint is of another model: {len(unlike)} tensors do not fit, such "
                    f"as {min(unlike)}. Choose another folder with --out."
                )
            with torch.no_grad():
                for key, value in theirs.items():
                    ours[key].copy_(value)
        self.optimizer.load_state_dict(found.optimizer)
        self.terms.remember(found.stopping)


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
            times.append(self.backbone.sample_timesteps(1, draw))
            dropped = torch.rand((), generator=draw).item() < self.recipe.train.caption_dropout
            latents.append(clean)
            texts.append(self.empty if dropped else text)
            grids.append(self._teachers(item))
        return Batch(
            torch.cat(latents).to(self.device),
            torch.stack(texts).float().to(self.device),
            torch.cat(noises).to(self.device),
            torch.cat(times).to(self.device),
            {encoder: self._stacked([grid[encoder] for grid in grids]) for encoder in grids[0]},
        )

    def _stacked(self, grids: list[TokenGrid]) -> TokenGrid:
        tokens = torch.cat([grid.tokens for grid in grids])
        return grids[0].with_tokens(tokens.float().to(self.device))

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


def stable_step_seed(recipe: Recipe, step: int) -> int:
    """Seed of torch's global generator for a step (dropout), or for the start, -1 (weights)."""
    return generator(recipe.seed, "step", step).initial_seed()


def _sample_numbers(recipe: Recipe, start: int) -> Iterator[range]:
    optim = recipe.optim
    for step in range(start, optim.steps):
        for micro in range(optim.accumulate):
            yield sample_numbers(step, micro, 0, 1, optim.batch_size, optim.accumulate)


def _ahead(batches: Iterator[Batch]) -> Iterator[Batch]:
    """The batches, each read in a thread while the one before is trained on."""
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, batches, None)
        while (batch := coming.result()) is not None:
            coming = pool.submit(next, batches, None)
            yield batch


def _resume(recipe: Recipe, run: Run, device: torch.device) -> tuple[_Student, int]:
    student = _Student(recipe, device)
    found = run.newest()
    if found is None:
        run.cut_log(0)
        return student, 0
    student.restore(found)
    run.cut_log(found.step)
    console.print(f"Going on from step {found.step} of {recipe.optim.steps}.", markup=False)
    return student, found.step


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


def _trackers(recipe: Recipe, run: Run, start: int) -> list[Callable[[dict[str, float]], None]]:
    writers = []
    if "tensorboard" in recipe.train.trackers:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise UserError(
                "tensorboard is not installed: pip install 'videorepa[tensorboard]'."
            ) from None
        board = SummaryWriter(str(run.path / "tensorboard"), purge_step=start + 1)

        def to_board(record: dict[str, float]) -> None:
            for key, value in record.items():
                if key != "step":
                    board.add_scalar(key, value, record["step"])

        writers.append(to_board)
    if "wandb" in recipe.train.trackers:
        try:
            import wandb  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise UserError("wandb is not installed: pip install 'videorepa[wandb]'.") from None
        session = wandb.init(
            project="videorepa", name=recipe.name, dir=run.path, id=run.path.name, resume="allow"
        )
        writers.append(lambda record: session.log(record, step=record["step"]))
    return writers


def _validation(recipe: Recipe, run: Run, student: _Student) -> Callable[[int], None]:
    """Generates the recipe's validation clips, at fixed seeds; does nothing where it has none."""
    if recipe.validation is None:
        return lambda step: None
    from videorepa.generate import Sampler

    prompts = recipe.validation.prompts
    helper = recipe.backbone.load(("vae", "text_encoder"), student.device)
    transformer = student.backbone.transformer
    sampler = Sampler(helper, recipe.data, recipe.generation, transformer)

    def validate(step: int) -> None:
        transformer.eval()
        for number, prompt in enumerate(prompts):
            path = run.samples / f"step-{step:08d}" / f"{number:02d}.mp4"
            sampler.write(prompt, 0, path)
        transformer.train()

    return validate
