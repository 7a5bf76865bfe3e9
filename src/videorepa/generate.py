"""Prompts to mp4 files with a sidecar each, through the stock diffusers pipeline."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from videorepa.artifacts.clips import check_clip_folder
from videorepa.artifacts.model import Model
from videorepa.backbones._sampler import Sampler, noise_seed
from videorepa.data.manifest import Prompt
from videorepa.data.video import write_video
from videorepa.errors import UserError
from videorepa.settings.sections import ClipSize, Generation
from videorepa.system.checks import check_shard
from videorepa.system.device import pick_device
from videorepa.system.files import atomic_write
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import track


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
    check_shard(shard)
    source = Model.of(model, backbone, step)
    settings, size = settings or source.settings, size or source.size
    source.spec.check_clip(size)
    about = (
        source.about()
        | size.model_dump(include=set(ClipSize.model_fields))
        | settings.model_dump()
        | {"noise": seed}
    )
    check_clip_folder(out, about)
    jobs = _jobs(prompts, settings.samples, seed)[shard[0] :: shard[1]]
    todo = [job for job in jobs if not job.is_done(out)]
    if todo:
        sampler = Sampler(source.load(pick_device(device)), size, settings)
        for job in track(todo, "generate", done=len(jobs) - len(todo)):
            frames = sampler.sample(job.prompt.text, job.seed)
            sidecar = job.sidecar(out)
            write_video(sidecar.with_suffix(".mp4"), frames, settings.fps)
            # The sidecar comes last: a clip without one is not done.
            known = {"prompt_id": job.prompt.id, "prompt": job.prompt.text}
            known |= {"caption": job.prompt.caption, "k": job.k, "seed": job.seed}
            atomic_write(sidecar, json.dumps(known | about, indent=1, ensure_ascii=False))
    return [job.sidecar(out).with_suffix(".mp4") for job in jobs]


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
