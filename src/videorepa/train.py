"""Fine-tunes a video diffusion model while a frozen video encoder's relations are distilled in."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from videorepa import checkpoint
from videorepa.align import Projector, Tapped, centred_similarity, tap
from videorepa.backbones import Backbone, Text
from videorepa.data.batches import clip_index, generator, sample_numbers
from videorepa.data.cache import Cache
from videorepa.data.source import Item, open_source
from videorepa.device import autocast, compute_dtype, pick_device
from videorepa.diffusion import Denoised
from videorepa.encoders import Encoder
from videorepa.errors import ClipError, UserError
from videorepa.inspect import inspect
from videorepa.progress import console, track
from videorepa.recipe import Optim, Recipe
from videorepa.run import Run
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
    with student.tapped():
        batches = _ahead(clips.batch(number) for number in _sample_numbers(recipe, start))
        for step in track(range(start, optim.steps), "train", done=start):
            torch.manual_seed(stable_step_seed(recipe, step))
            rate = optim.learning_rate * schedule(optim, step)
            measured: list[dict[str, float]] = []
            for _ in range(optim.accumulate):
                batch = next(batches)
                with autocast(student.device, student.dtype):
                    denoise = student.denoise(batch).loss.mean()
                    align, aligned = student.align(batch)
                loss = denoise + student.align_weight * align
                _check_finite(step, run, denoise=denoise, align=align)
                (loss / optim.accumulate).backward()
                measured.append({"denoise": denoise.item(), **aligned.read()})
                seen += len(batch.latents)
            norm = student.clip_gradients(optim.max_grad_norm)
            _check_finite(step, run, gradient=norm)
            student.update(rate)

            values = {key: _mean(m[key] for m in measured) for key in measured[0]}
            record = {
                "step": step + 1,
                "loss": values["denoise"] + student.counted_weight * values.get("align", 0.0),
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
    """All that one micro-batch needs, on the training device."""

    latents: Float[Tensor, "b f c h w"]
    text: Text
    noise: Float[Tensor, "b f c h w"]
    timestep: Num[Tensor, " b"]
    teacher: TokenGrid | None


class _Student:
    """The transformer, the projector beside it, and their optimiser.

    At weight 0 the projector still learns, on tokens cut off from the transformer: so the control
    is plain fine-tuning, and its alignment is measured as fairly as the aligned run's.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self.recipe, self.device = recipe, device
        self.dtype = compute_dtype(recipe.train.precision, device)
        self.counted_weight = recipe.align.weight if recipe.align else 0.0
        self.is_probe = self.counted_weight == 0
        self.align_weight = self.counted_weight or 1.0
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
            recipe.backbone.add_lora(transformer, recipe.train.lora)
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.trained = {k: p for k, p in transformer.named_parameters() if p.requires_grad}
        self.projector: nn.Module = nn.Identity()
        if recipe.alignment is not None:
            align, encoder = recipe.alignment
            grid = recipe.backbone.shapes(recipe.data).grid
            teacher = encoder.shape(recipe.data.frames)
            self.projector = Projector.between(grid, teacher, align.hidden).to(device)
        self._tapped: Tapped | None = None
        optim = recipe.optim
        self.optimizer = torch.optim.AdamW(
            [*self.trained.values(), *self.projector.parameters()],
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

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Keep the output of the block that the recipe aligns."""
        if self.recipe.align is None:
            yield
            return
        with tap(self.backbone.block(self.recipe.align.block)) as self._tapped:
            yield

    def align(self, batch: Batch) -> tuple[Tensor, _Aligned]:
        """The alignment loss of the batch that was just denoised, and what is logged of it."""
        if self.recipe.align is None or batch.teacher is None or self._tapped is None:
            return torch.zeros((), device=self.device), _Aligned()
        gradients = _GradientNorms(self._tapped.take(), detach=self.is_probe)
        grid = self.backbone.grid(gradients.branch, batch.latents)
        ours = self.projector(grid, like=batch.teacher)
        loss = self.recipe.align.loss(ours, batch.teacher)
        similarity = centred_similarity(ours, batch.teacher).item()
        return loss, _Aligned({"align": loss.item(), "similarity": similarity}, gradients)

    def clip_gradients(self, limit: float) -> Tensor:
        """Scale gradients to a joint norm of at most `limit`; a probe must not take a share."""
        trained, projector = list(self.trained.values()), list(self.projector.parameters())
        if self.is_probe:
            nn.utils.clip_grad_norm_(projector, limit)
            return nn.utils.clip_grad_norm_(trained, limit)
        return nn.utils.clip_grad_norm_([*trained, *projector], limit)

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
            self.projector.state_dict(),
            self.optimizer.state_dict(),
            self.ema,
        )

    def restore(self, found: checkpoint.Checkpoint) -> None:
        """Take up a checkpoint. Raises UserError if it is of another model."""
        for ours, theirs in (
            (self.trained, found.trained),
            (self.projector.state_dict(), found.projector),
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


@dataclass(frozen=True)
class _Aligned:
    """What is logged of an alignment; the gradients' part is known after the backward pass."""

    values: dict[str, float] = field(default_factory=dict)
    gradients: _GradientNorms | None = None

    def read(self) -> dict[str, float]:
        return self.values | (self.gradients.read() if self.gradients else {})


class _GradientNorms:
    """Measures, while the one backward pass runs, how strong each term's gradient is at the tap.

    The alignment's share arrives through a branch of its own; the rest of what arrives at the
    tapped tokens is the diffusion loss's. A learnable projector can absorb all of the alignment's
    gradient, which this makes visible.
    """

    def __init__(self, output: Any, detach: bool) -> None:
        self._align = self._denoise = 0.0
        self._arrived: Tensor | None = None
        # Blocks give a tensor, or a tuple that begins with the video's tokens.
        tokens, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        branch = tokens.detach() if detach else tokens.view_as(tokens)
        if branch.requires_grad:
            branch.register_hook(self._from_branch)
        if tokens.requires_grad:
            tokens.register_hook(self._from_all)
        self.branch = branch if rest is None else (branch, *rest)

    def _from_branch(self, gradient: Tensor) -> None:
        self._arrived = gradient

    def _from_all(self, gradient: Tensor) -> None:
        rest = gradient.float()
        if self._arrived is not None:
            self._align = self._arrived.float().norm().item()
            rest = rest - self._arrived.float()
        self._denoise, self._arrived = rest.norm().item(), None

    def read(self) -> dict[str, float]:
        return {"grad_align": self._align, "grad_denoise": self._denoise}


class _Clips:
    """Turns sample numbers into batches, from the cache and, where it is online, the teacher."""

    def __init__(self, recipe: Recipe, backbone: Backbone, device: torch.device) -> None:
        self.recipe, self.backbone, self.device = recipe, backbone, device
        self.source = open_source(recipe.data)
        self.cache = Cache(recipe)
        self.encoder: Encoder | None = None
        if recipe.alignment is not None and recipe.alignment[0].teacher == "online":
            self.encoder = recipe.alignment[1].load(
                device, compute_dtype(recipe.train.precision, device)
            )
        self.items = self.cache.ready(self.source.items, recipe.stores_features)
        self.place = {item.id: index for index, item in enumerate(self.source.items)}
        self.empty = self.cache.read_empty_caption()

    def batch(self, numbers: range) -> Batch:
        seed = self.recipe.seed
        latents, noises, texts, times, teachers = [], [], [], [], []
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
            teachers.append(self._teacher(item))
        return Batch(
            torch.cat(latents).to(self.device),
            {name: torch.stack([t[name] for t in texts]).to(self.device) for name in texts[0]},
            torch.cat(noises).to(self.device),
            torch.cat(times).to(self.device),
            self._stacked(teachers),
        )

    def _stacked(self, grids: list[TokenGrid | None]) -> TokenGrid | None:
        found = [grid for grid in grids if grid is not None]
        if not found:
            return None
        tokens = torch.cat([grid.tokens for grid in found])
        return found[0].with_tokens(tokens.float().to(self.device))

    def _teacher(self, item: Item) -> TokenGrid | None:
        if self.recipe.stores_features:
            return self.cache.read_features(item)
        if self.encoder is None:
            return None
        try:
            frames = self.source.frames(self.place[item.id])
        except ClipError as error:
            raise UserError(
                f"The clip {item.id!r} can no longer be read ({error}), and the teacher is online. "
                "Run `videorepa prepare` again, or set align.teacher to cached."
            ) from None
        video = torch.from_numpy(frames).permute(0, 3, 1, 2)[None].float() / 255.0
        return self.encoder(video)


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
