"""Prompts to mp4 files with a sidecar each, through the stock diffusers pipeline."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videorepa import plugins
from videorepa.backbones import Backbone, BackboneSpec, Part
from videorepa.checkpoint import Checkpoint
from videorepa.data.batches import stable_seed
from videorepa.data.files import atomic_write, is_vacant, sweep
from videorepa.data.fingerprint import json_digest, weights_digest
from videorepa.data.manifest import Prompt
from videorepa.data.video import write_video
from videorepa.device import Precision, compute_dtype, pick_device
from videorepa.errors import UserError
from videorepa.progress import track
from videorepa.recipe import ClipSize, Generation, Recipe
from videorepa.run import Run


def generate(
    model: Path,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    settings: Generation | None = None,
    size: ClipSize | None = None,
    backbone: str = "cogvideox",
    step: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
) -> list[Path]:
    """Generate `settings.samples` clips of every prompt into `out`; clips already there are kept.

    model: a run's folder; a recipe, whose untouched base model is sampled from then; or a diffusers
        folder, of the kind that `backbone` names.
    size, settings: by default the recipe's, and a folder's own size.
    step: the run's checkpoint to take; by default the newest.
    seed: another one gives every clip other noise.
    shard: (i, n) does every n-th clip from the i-th.
    A clip's noise is a function of its prompt, its number k and `seed`, so that every model starts
    from the same; see `noise_seed`. Raises UserError if `out` holds clips of another model or of
    other settings, or if a prompt's id occurs twice.
    """
    if not prompts:
        raise UserError("There are no prompts. Give a .txt, .csv or .jsonl file with at least one.")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(f"The prompt id {twice!r} occurs twice; ids name the files.")
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"The shard {index}/{count} does not exist; give i/n with 0 <= i < n.")
    source = Source.of(model, backbone, step)
    settings, size = settings or source.settings, size or source.size
    source.spec.check_clip(size)
    about = (
        source.about()
        | size.model_dump(include=set(ClipSize.model_fields))
        | settings.model_dump()
        | {"noise": seed}
    )
    _check_folder(out, about)
    jobs = _jobs(prompts, settings.samples, seed)[index::count]
    todo = [job for job in jobs if not job.is_done(out)]
    if todo:
        sampler = Sampler(source.load(pick_device(device)), size, settings)
        for job in track(todo, "generate", done=len(jobs) - len(todo)):
            frames = sampler.sample(job.prompt.text, job.seed)
            sidecar = job.sidecar(out)
            sampler.write(sidecar.with_suffix(".mp4"), frames)
            # The sidecar comes last: a clip without one is not done.
            known = {"prompt_id": job.prompt.id, "prompt": job.prompt.text}
            known |= {"caption": job.prompt.caption, "k": job.k, "seed": job.seed}
            atomic_write(sidecar, json.dumps(known | about, indent=1, ensure_ascii=False))
    return [job.sidecar(out).with_suffix(".mp4") for job in jobs]


def noise_seed(prompt: str, k: int, nth: int = 0, seed: int = 0) -> int:
    """What the noise of a clip is drawn from: its prompt's text, its number k, the how-many-th
    time the text occurs among the prompts, from 0, and the seed of all of them."""
    return stable_seed("generate", prompt, k, nth, seed)


@dataclass(frozen=True)
class _Job:
    """One clip to make. seed: of its noise."""

    prompt: Prompt
    k: int
    seed: int

    def sidecar(self, out: Path) -> Path:
        # An id that could be a path or a whole caption is replaced by its digest.
        name = self.prompt.id
        safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", name)
        return out / f"{name if safe else json_digest(name)}-{self.k}.json"

    def is_done(self, out: Path) -> bool:
        sidecar = self.sidecar(out)
        return sidecar.exists() and sidecar.with_suffix(".mp4").exists()


def _jobs(prompts: Sequence[Prompt], samples: int, seed: int) -> list[_Job]:
    seen: Counter[str] = Counter()
    jobs = []
    for prompt in prompts:
        # Equal prompts get noise of their own, or their clips would be one clip counted twice.
        nth = seen[prompt.text]
        seen[prompt.text] += 1
        for k in range(samples):
            jobs.append(_Job(prompt, k, noise_seed(prompt.text, k, nth, seed)))
    return jobs


def default_settings(model: Path, backbone: str = "cogvideox") -> Generation:
    """The settings that `generate` uses for a model unless told otherwise."""
    if Run.is_one(model):
        return Run.open(model).recipe.generation
    return Source.of(model, backbone).settings


@dataclass(frozen=True)
class Source:
    """A model to sample from or to look into: a run, or an untouched base model."""

    name: str
    spec: BackboneSpec
    size: ClipSize
    settings: Generation
    precision: Precision
    run: Run | None = None
    trained: Checkpoint | None = None

    @classmethod
    def of(cls, model: Path, backbone: str = "cogvideox", step: int | None = None) -> Source:
        """What `generate` calls a model. Raises UserError if it is none."""
        if step is not None and not Run.is_one(model):
            raise UserError(f"{model} is not a run, so it has no checkpoint of step {step}.")
        if model.is_file():
            recipe = Recipe.from_yaml(model)
            name = str(recipe.backbone.weights)
        elif Run.is_one(model):
            run = Run.open(model)
            recipe = run.recipe
            # Read once: a full-size checkpoint, optimiser and all, is tens of gigabytes.
            trained = run.trained(step)
            name = f"{recipe.name}, step {trained.step}"
            settings, precision = recipe.generation, recipe.train.precision
            return cls(name, recipe.backbone, recipe.data, settings, precision, run, trained)
        elif (model / "model_index.json").is_file() or str(model) == "micro":
            spec = plugins.description("backbones", backbone)(name=backbone, weights=str(model))
            settings = Generation(**spec.generation)
            return cls(str(model), spec, spec.default_size(), settings, "auto")
        else:
            raise UserError(
                f"{model} is not a run (no recipe.yaml), not a recipe file and not a diffusers "
                "folder (no model_index.json)."
            )
        return cls(name, recipe.backbone, recipe.data, recipe.generation, recipe.train.precision)

    def about(self) -> dict[str, Any]:
        """What a clip's sidecar says of the model."""
        base = self.spec.fingerprint() | {"transformer": self.spec.weights_digest()}
        if self.run is None or self.trained is None:
            return {"model": self.name, "model_digest": json_digest(base)}
        newest = self.run.checkpoints / f"step-{self.trained.step:08d}"
        return {"model": self.name, "model_digest": json_digest([base, weights_digest(newest)])}

    def load(
        self,
        device: torch.device,
        parts: tuple[Part, ...] = ("transformer", "vae", "text_encoder"),
    ) -> Backbone:
        """The live model, with what the run has trained put in."""
        dtype = compute_dtype(self.precision, device)
        if self.run is not None:
            return self.run.backbone(parts, device, dtype, self.trained)
        return self.spec.load(parts, device, dtype)


class Sampler:
    """A stock pipeline with its settings; one clip at a time, so that none depends on the others.

    transformer: used in place of the backbone's own, for models in training.
    """

    def __init__(
        self, backbone: Backbone, size: ClipSize, settings: Generation, transformer: Any = None
    ) -> None:
        self.pipeline = backbone.pipeline(transformer)
        self.pipeline.set_progress_bar_config(disable=True)
        self.arguments = backbone.sampling(size, settings)
        self.settings = settings

    def sample(self, prompt: str, seed: int) -> np.ndarray:
        """One clip, (frames, height, width, 3) uint8, from the noise of that seed."""
        frames = self.pipeline(
            prompt=prompt,
            generator=torch.Generator().manual_seed(seed),
            output_type="np",
            **self.arguments,
        ).frames[0]
        if not np.isfinite(frames).all():
            raise UserError(
                f"The model gives values that are not finite for {prompt[:80]!r}. Its weights are "
                "damaged, or the precision is too low for it: try float32."
            )
        return (frames * 255.0).round().clip(0, 255).astype(np.uint8)

    def write(self, path: Path, frames: np.ndarray) -> None:
        """Keep a clip as an mp4 file, at the settings' frame rate."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, frames, self.settings.fps)


def _check_folder(out: Path, about: dict[str, Any]) -> None:
    path = out / "generation.json"
    # In this order: another process that was started with this one may be writing it.
    begun = not is_vacant(out)
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in about if found.get(key) != about[key] and key != "samples"]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); it says what the clips were made with. Delete it "
                "and the clips beside it, or choose another folder with --out."
            ) from None
        if differing:
            raise UserError(
                f"{out} holds clips made otherwise; they differ in "
                + ", ".join(f"{key} ({found.get(key)}, now {about[key]})" for key in differing)
                + ". Choose another folder with --out."
            )
    elif begun:
        raise UserError(f"{out} exists and does not hold generated clips. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if not path.exists():
        atomic_write(path, json.dumps(about, indent=1))
