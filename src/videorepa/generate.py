"""Generates clips from prompts, each an mp4 file with a JSON sidecar."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from videorepa.artifacts.clips import MadeWith, Sidecar, claim, clip_path, left_over
from videorepa.artifacts.model import Model
from videorepa.backbones._sampler import Offload, Sampler, encode_prompts, noise_seed
from videorepa.data.manifest import Prompt
from videorepa.data.video import write_video
from videorepa.errors import UserError, within_memory
from videorepa.remedies import in_sampling
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.checks import check_shard
from videorepa.system.device import pick_device
from videorepa.system.progress import console, track
from videorepa.system.wording import count


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
    offload: Offload = "none",
    device: str | None = None,
) -> list[Path]:
    """Generate `settings.samples` clips of every prompt, and keep clips that are already there.

    A clip that is there is kept if it is of the same prompt, seed and settings. Clips of prompts
    that are no longer in the list stay, but neither `evaluate` nor `report` counts them.

    The noise of a clip is a function of its prompt, its number k and `seed`, so that all models
    start from the same noise; see `noise_seed`.

    All prompts are encoded before the transformer is loaded, and kept in main memory.

    Args:
        model: A run's folder, a recipe (its untouched base model), or a diffusers folder.
        prompts: What to generate; their ids name the files.
        out: Folder of the clips.
        settings: How to sample; by default as the recipe says.
        size: Size of the clips; by default the recipe's, or the one a diffusers folder is made for.
        backbone: Kind of a diffusers folder.
        step: Step of the run's checkpoint to use; by default the newest.
        seed: Another seed gives every clip other noise.
        shard: (i, n) generates every n-th clip, starting at the i-th.
        offload: What waits in main memory while it does not run: "model" keeps one model at a time
            on the GPU, "group" one layer of the transformer. The clips are the same.
        device: Where to compute; by default the first GPU, or the CPU.

    Returns:
        The videos of the shard, in the order of the prompts.

    Raises:
        UserError: `out` holds clips of another model or of other settings, or a clip of another
            prompt where one of these belongs; there are no prompts, or a prompt's id occurs twice;
            the CPU is to offload.
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
    source.spec.check_text_mode("`generate`")
    source.spec.check_generation(settings)
    made_with = MadeWith.model_validate(
        source.about()
        | size.model_dump(include=set(ClipSize.model_fields))
        | settings.model_dump()
        | {"noise": seed, "precision": str(source.dtype(where)).removeprefix("torch.")}
    )
    every = list(_clips(prompts, settings.samples, seed, made_with, out))
    claim(out, made_with, every)
    if others := left_over(out):
        console.print(
            f"{out} holds {count(len(others), 'clip')} of prompts or samples that are not in the "
            f"list, the first is {others[0].path.name}; evaluate and report leave them out.",
        )
    clips = every[shard[0] :: shard[1]]
    todo = [clip for clip in clips if not clip.is_done]
    if todo:
        with within_memory(in_sampling(settings, offload)):
            sampler = _sampler(source, todo, size, settings, where, offload)
            for clip in track(todo, "generate", done=len(clips) - len(todo)):
                assert clip.seed is not None
                # A sidecar whose video is gone may be of another prompt, and must not stand beside
                # this.
                clip.sidecar.unlink(missing_ok=True)
                write_video(clip.path, sampler.sample(clip.prompt, clip.seed), settings.fps)
                clip.write()
    return [clip.path for clip in clips]


def _sampler(
    source: Model,
    clips: Sequence[Sidecar],
    size: ClipSize,
    settings: Generation,
    where: torch.device,
    offload: Offload,
) -> Sampler:
    """Encode the prompts of clips, drop the text encoders, and load the rest of the model."""
    dtype = source.dtype(where)
    coder = source.spec.load(("text_encoder",), where, dtype)
    if note := coder.cut_note("prompts", {clip.prompt_id: clip.prompt for clip in clips}):
        console.print(note)
    prompts = list(dict.fromkeys(clip.prompt for clip in clips))
    texts = encode_prompts(coder, track(prompts, "encode prompts"), settings)
    del coder
    home = where if offload == "none" else torch.device("cpu")
    backbone = source.load(home, dtype, ("transformer", "vae"))
    backbone.device = where
    return Sampler(backbone, size, settings, texts, offload=offload)


def _clips(
    prompts: Sequence[Prompt], samples: int, seed: int, made_with: MadeWith, out: Path
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
            yield Sidecar.model_validate(about | made_with.model_dump())
