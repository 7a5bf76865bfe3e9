"""Prompts to mp4 files with a sidecar each, through the stock diffusers pipeline."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from videorepa import plugins
from videorepa.backbones import Backbone, BackboneSpec
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
    shard: tuple[int, int] = (0, 1),
    device: str | None = None,
) -> list[Path]:
    """Generate `settings.samples` clips of every prompt into `out`; clips already there are kept.

    model: a run's folder; a recipe, whose untouched base model is sampled from then; or a diffusers
        folder, of the kind that `backbone` names.
    size, settings: by default the recipe's, and a folder's own size.
    shard: (i, n) does every n-th clip from the i-th.
    The seed of a clip is a function of its prompt and its number k alone, so that every model
    starts from the same noise. Raises UserError if `out` holds clips of another model or of other
    settings, or if a prompt's id occurs twice.
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
    source = _Source.of(model, backbone)
    settings, size = settings or source.settings, size or source.size
    source.spec.check_clip(size)
    about = (
        source.about() | size.model_dump(include=set(ClipSize.model_fields)) | settings.model_dump()
    )
    _check_folder(out, about)
    jobs = [(prompt, k) for prompt in prompts for k in range(settings.samples)][index::count]
    todo = [(p, k) for p, k in jobs if not _is_done(_sidecar(out, p, k))]
    if todo:
        sampler = Sampler(source.load(pick_device(device)), size, settings)
        for prompt, k in track(todo, "generate", done=len(jobs) - len(todo)):
            sidecar = _sidecar(out, prompt, k)
            frames, seed = sampler.sample(prompt.text, k)
            sampler.write(sidecar.with_suffix(".mp4"), frames)
            # The sidecar comes last: a clip without one is not done.
            known = {"prompt_id": prompt.id, "prompt": prompt.text, "k": k, "seed": seed}
            atomic_write(sidecar, json.dumps(known | about, indent=1, ensure_ascii=False))
    return [_sidecar(out, prompt, k).with_suffix(".mp4") for prompt, k in jobs]


def default_settings(model: Path, backbone: str = "cogvideox") -> Generation:
    """The settings that `generate` uses for a model unless told otherwise."""
    if Run.is_one(model):
        return Run.open(model).recipe.generation
    return _Source.of(model, backbone).settings


@dataclass(frozen=True)
class _Source:
    """A model to sample from: a run, or an untouched base model."""

    name: str
    spec: BackboneSpec
    size: ClipSize
    settings: Generation
    precision: Precision
    run: Run | None = None
    trained: Checkpoint | None = None

    @classmethod
    def of(cls, model: Path, backbone: str) -> _Source:
        if model.is_file():
            recipe = Recipe.from_yaml(model)
            name = str(recipe.backbone.weights)
        elif Run.is_one(model):
            run = Run.open(model)
            recipe = run.recipe
            # Read once: a full-size checkpoint, optimiser and all, is tens of gigabytes.
            trained = run.trained()
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

    def load(self, device: torch.device) -> Backbone:
        dtype = compute_dtype(self.precision, device)
        parts = ("transformer", "vae", "text_encoder")
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

    def sample(self, prompt: str, k: int) -> tuple[np.ndarray, int]:
        """One clip, (frames, height, width, 3) uint8, and its seed."""
        seed = stable_seed("generate", prompt, k)
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
        return (frames * 255.0).round().clip(0, 255).astype(np.uint8), seed

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


def _is_done(sidecar: Path) -> bool:
    return sidecar.exists() and sidecar.with_suffix(".mp4").exists()


def _sidecar(out: Path, prompt: Prompt, k: int) -> Path:
    # An id that could be a path or a whole caption is replaced by its digest.
    safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", prompt.id)
    return out / f"{prompt.id if safe else json_digest(prompt.id)}-{k}.json"
