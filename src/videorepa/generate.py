"""Generates clips from prompts, each an mp4 file with a JSON sidecar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from PIL.Image import Image, fromarray

from videorepa.artifacts.clips import (
    MadeWith,
    Sidecar,
    claim,
    clip_path,
    filmed_path,
    image_path,
    left_over,
)
from videorepa.artifacts.model import Model
from videorepa.backbones import Part
from videorepa.backbones._sampler import Offload, Sampler, encode_prompts, noise_seed
from videorepa.benchmarks import Benchmark, ClipForm
from videorepa.conditioning import frames_of, latents_for
from videorepa.data.image import DIGEST, image_digest, read_image
from videorepa.data.manifest import Prompt
from videorepa.data.video import write_video
from videorepa.errors import UserError, within_memory
from videorepa.remedies import in_sampling
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.checks import check_shard
from videorepa.system.device import pick_device
from videorepa.system.files import atomic_path, link_or_copy
from videorepa.system.progress import console, track
from videorepa.system.wording import count


def generate(
    model: Path,
    prompts: Sequence[Prompt],
    out: Path,
    *,
    settings: Generation | None = None,
    size: ClipSize | None = None,
    backbone: str | None = None,
    step: int | None = None,
    seed: int = 0,
    shard: tuple[int, int] = (0, 1),
    offload: Offload = "none",
    device: str | None = None,
    benchmark: Benchmark | None = None,
) -> list[Path]:
    """Generate `settings.samples` clips of every prompt, and keep clips that are already there.

    A clip that is there is kept if it is of the same prompt, seed and settings. Clips of prompts
    that are no longer in the list stay, but neither `evaluate` nor `report` counts them.

    Prompts that have images are continued from them, each the first frame of its clip. `out` keeps
    the images as the model is shown them.

    Clips for a benchmark are cut to the length that it scores. `out` also has them under the names
    that its authors want, as hard links where the file system allows, and beside them what happened
    in their place, where that was filmed.

    The noise of a clip is a function of its prompt, its number k and `seed`, so that all models
    start from the same noise; see `noise_seed`.

    All prompts are encoded before the transformer is loaded, and kept in main memory.

    Args:
        model: A run's folder, a recipe (its untouched base model), or a diffusers folder.
        prompts: What to generate; their ids name the files.
        out: Folder of the clips.
        settings: How to sample; by default as the recipe says.
        size: Size of the clips; by default the recipe's, or the one a diffusers folder is made for.
        backbone: Kind of a diffusers folder; by default the one that loads its pipeline.
        step: Step of the run's checkpoint to use; by default the newest.
        seed: Another seed gives every clip other noise.
        shard: (i, n) generates every n-th clip, starting at the i-th.
        offload: What waits in main memory while it does not run: "model" keeps one model at a time
            on the GPU, "group" one layer of the transformer. The clips are the same.
        device: Where to compute; by default the first GPU, or the CPU.
        benchmark: The benchmark that the prompts are of.

    Returns:
        The videos of the shard, in the order of the prompts.

    Raises:
        UserError: `out` holds clips of another model or of other settings, or a clip of another
            prompt where one of these belongs; there are no prompts, or a prompt's id occurs twice;
            the CPU is to offload; an image is missing or cannot be used; or the benchmark cannot
            score such clips, or the model cannot be shown as many frames as it gives.
    """
    if not prompts:
        raise UserError("There are no prompts. Give a .txt, .csv or .jsonl file with at least one.")
    ids = [prompt.id for prompt in prompts]
    if len(set(ids)) < len(ids):
        twice = next(name for name in ids if ids.count(name) > 1)
        raise UserError(
            f"The prompt id {twice!r} occurs twice. Ids name the files, so each must be unique."
        )
    check_shard(shard)
    where = pick_device(device)
    if offload != "none" and where.type == "cpu":
        raise UserError(
            f"The clips are to be made on the CPU, and offload is {offload}: there is nowhere else "
            "to keep weights. Leave it out."
        )
    source = Model.of(model, backbone, step)
    settings, size = settings or source.settings, size or source.size
    source.spec.check_clip(size)
    source.spec.check_generation(settings)
    form = benchmark.form(settings.fps) if benchmark else ClipForm()
    if benchmark is not None and form.shown:
        openings = _drawn(prompts, source, benchmark, form.shown, size)
    else:
        openings = _from_images(prompts, source, size, form.whole_image)
    kept = _length(form, size, settings.fps, benchmark)
    if form.whole_image and not openings:
        raise UserError(
            f"{source.spec.weights} takes text alone, and what is scored are continuations of "
            "images. Choose a model that continues an image (docs/first-frame.md)."
        )
    made_with = MadeWith.model_validate(
        source.about()
        | size.model_dump(include=set(ClipSize.model_fields))
        | settings.model_dump()
        | {"noise": seed, "precision": str(source.dtype(where)).removeprefix("torch.")}
        | ({"frames": kept, "cut_from": size.frames} if kept < size.frames else {})
        | ({"whole_image": True} if form.whole_image else {})
        | ({"shown_frames": openings[prompts[0].id].count} if form.shown else {})
    )
    every = list(_clips(prompts, openings, settings.samples, seed, made_with, out))
    claim(out, made_with, every)
    if others := left_over(out):
        console.print(
            f"{out} holds {count(len(others), 'clip')} of prompts or samples that are not in the "
            f"list, the first is {others[0].path.name}; evaluate and report leave them out.",
        )
    clips = every[shard[0] :: shard[1]]
    todo = [clip for clip in clips if not clip.is_done]
    of_prompts = {clip.prompt_id: clip for clip in clips}
    if openings:  # Before any model is loaded, since an image may be refused.
        _keep_images(out, openings, of_prompts)
    if todo:
        with within_memory(in_sampling(settings, offload, where)):
            sampler = _sampler(source, todo, size, settings, where, offload, openings)
            for clip in track(todo, "generate", done=len(clips) - len(todo)):
                assert clip.seed is not None
                # A sidecar whose video is gone may be of another prompt, and must not stand beside
                # this.
                clip.sidecar.unlink(missing_ok=True)
                shown = openings[clip.prompt_id].frames() if openings else []
                frames = sampler.sample(clip.prompt, clip.seed, shown)
                write_video(clip.path, frames[:kept], settings.fps)
                clip.write()
    if benchmark is not None:
        _publish(out, clips, benchmark)
        _keep_films(out, of_prompts.values(), benchmark)
    return [clip.path for clip in clips]


@dataclass(frozen=True)
class _FirstFrames:
    """What the model is shown of a clip that it continues.

    Attributes:
        digest: What it is called in sidecars.
        count: How many frames it has.
        frames: Makes them, PIL images of the clip's size.
    """

    digest: str
    count: int
    frames: Callable[[], list[Image]]


def _drawn(
    prompts: Sequence[Prompt], source: Model, benchmark: Benchmark, least: int, size: ClipSize
) -> dict[str, _FirstFrames]:
    """The openings that the benchmark draws, by the prompts' ids: as many frames as fill latents.

    Raises:
        UserError: The model cannot be shown as many, or has clips of another shape.
    """
    spec, stride = source.spec, source.spec.geometry().frames
    latents, conditioning = latents_for(least, stride), source.spec.conditioning()
    most = 0 if conditioning is None else conditioning.most
    if most is not None and most < latents:
        raise UserError(
            f"{benchmark.name} has models continue {count(least, 'frame')}, which takes {latents} "
            f"latents here ({frames_of(latents, stride)} frames); {spec.weights} is shown "
            f"{count(most, 'latent') if most else 'none'}. Choose a model that continues several "
            "(docs/first-frame.md): Cosmos, or LTX with backbone.positions causal."
        )
    number = frames_of(latents, stride)

    def drawn(caption: str) -> np.ndarray:
        return benchmark.opening(caption, number, size.height, size.width)

    return {
        prompt.id: _FirstFrames(
            sha256(drawn(prompt.caption).tobytes()).hexdigest()[:DIGEST],
            number,
            lambda caption=prompt.caption: [fromarray(frame) for frame in drawn(caption)],
        )
        for prompt in prompts
    }


def _from_images(
    prompts: Sequence[Prompt], source: Model, size: ClipSize, whole: bool
) -> dict[str, _FirstFrames]:
    """The prompts' images by the prompts' ids; none where the model works from text alone."""

    def read(path: Path) -> list[Image]:
        return [read_image(path, size.height, size.width, whole=whole)]

    return {
        name: _FirstFrames(image_digest(path), 1, partial(read, path))
        for name, path in _images(prompts, source).items()
    }


def _images(prompts: Sequence[Prompt], source: Model) -> dict[str, Path]:
    """The images to continue by the prompts' ids; none where the model works from text alone."""
    images = {prompt.id: prompt.image for prompt in prompts if prompt.image is not None}
    if images and source.spec.conditioning() is None:
        console.print(
            f"The prompts have images, and {source.spec.weights} takes text alone: it is shown "
            "none of them."
        )
        return {}
    if len(images) < len(prompts) and (images or source.spec.takes_image):
        lacking = next(prompt.id for prompt in prompts if prompt.image is None)
        raise UserError(
            f"The prompt {lacking!r} has no image"
            + (f", and {source.spec.weights} continues one. " if not images else "; others have. ")
            + "Name it in the column `image` of a .csv or .jsonl list, or give --images a folder "
            "of images that are called by the prompts' ids."
        )
    return images


def _length(form: ClipForm, size: ClipSize, fps: float, benchmark: Benchmark | None) -> int:
    """How many frames of a clip are kept, and print what is cut and what the scorer has to do.

    Raises:
        UserError: The model's clips are too short for the benchmark.
    """
    if benchmark is None or form.frames is None:
        return size.frames
    if size.frames < form.frames:
        raise UserError(
            f"Clips of {size.frames} frames at {fps:g} a second last {size.frames / fps:.3g} s, "
            f"and {benchmark.name} scores {form.frames} frames at this rate. Choose a model or a "
            "recipe that makes longer clips (data.frames, generation.fps)."
        )
    if cut := size.frames - form.frames:
        console.print(
            f"Clips of {size.frames} frames are cut to the first {form.frames}, as "
            f"{benchmark.name} scores them; {count(cut, 'frame')} of each are not kept."
        )
    if form.note:
        console.print(form.note)
    return form.frames


def _keep_images(
    out: Path, openings: Mapping[str, _FirstFrames], prompts: Mapping[str, Sidecar]
) -> None:
    """Write first frames as the model is shown them. Raises UserError if one cannot be used."""
    for name, clip in prompts.items():
        kept = image_path(out, str(clip.image))
        if kept.exists():
            continue
        image, *_ = openings[name].frames()
        kept.parent.mkdir(exist_ok=True)
        with atomic_path(kept) as temporary:
            image.save(temporary)


def _publish(out: Path, clips: Sequence[Sidecar], benchmark: Benchmark) -> None:
    """Give clips the names that the benchmark's authors want."""
    for clip in clips:
        if path := benchmark.published_path(clip.caption, clip.k):
            (out / path).parent.mkdir(exist_ok=True)
            link_or_copy(clip.path, out / path)


def _keep_films(out: Path, prompts: Iterable[Sidecar], benchmark: Benchmark) -> None:
    """Write what happened in the place of clips, where the benchmark has it."""
    for clip in track(list(prompts), "copy true clips"):
        path = filmed_path(out, clip.prompt_id)
        if path.exists():
            continue
        frames = benchmark.filmed(clip.caption, clip.frames, clip.height, clip.width)
        if frames is not None:
            path.parent.mkdir(exist_ok=True)
            write_video(path, frames, clip.fps)


def _sampler(
    source: Model,
    clips: Sequence[Sidecar],
    size: ClipSize,
    settings: Generation,
    where: torch.device,
    offload: Offload,
    openings: Mapping[str, _FirstFrames],
) -> Sampler:
    """Encode the prompts of clips, drop the text encoders, and load the rest of the model."""
    dtype = source.dtype(where)
    coder = source.spec.load(("text_encoder",), where, dtype)
    if note := coder.cut_note("prompts", {clip.prompt_id: clip.prompt for clip in clips}):
        console.print(note)
    sees_image = source.spec.text_sees_image
    shown = {
        (clip.prompt, openings[clip.prompt_id].digest if sees_image else ""): clip.prompt_id
        for clip in clips
    }
    images = (openings[name].frames()[0] if sees_image else None for name in shown.values())
    prompts = track([prompt for prompt, _ in shown], "encode prompts")
    texts = encode_prompts(coder, prompts, settings, images)
    del coder
    home = where if offload == "none" else torch.device("cpu")
    parts: tuple[Part, ...] = ("transformer", "vae")
    if openings:
        parts = (*parts, "image_encoder")
    backbone = source.load(home, dtype, parts)
    backbone.device = where
    return Sampler(backbone, size, settings, texts, offload=offload, from_image=bool(openings))


def _clips(
    prompts: Sequence[Prompt],
    openings: Mapping[str, _FirstFrames],
    samples: int,
    seed: int,
    made_with: MadeWith,
    out: Path,
) -> Iterator[Sidecar]:
    seen: Counter[str] = Counter()
    for prompt in prompts:
        # Equal prompts get different noise. Otherwise their clips would be copies of one clip.
        nth = seen[prompt.text]
        seen[prompt.text] += 1
        for k in range(samples):
            about = {
                "path": clip_path(out, prompt.id, k),
                "prompt_id": prompt.id,
                "prompt": prompt.text,
                "caption": prompt.caption,
                "k": k,
                "seed": noise_seed(prompt.text, k, nth, seed),
            }
            if openings:
                about["image"] = openings[prompt.id].digest
            yield Sidecar.model_validate(about | made_with.model_dump())
