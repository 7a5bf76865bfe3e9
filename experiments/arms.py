"""What alignment did to the arms of a study while they trained, and how far their clips are apart.

Run: python experiments/arms.py STUDY [--recipe FILE] [--out docs/study/arms.csv]

For every arm of the main table that is done, over the seeds that are: the alignment loss over the
first and the last 50 steps; the norm of its gradient at the tapped block, weighted, against the
denoising loss's, and the cosine of the two, over all steps; the denoising loss on clips of the
same world that no arm was trained on, at eight noise levels with noise that is the same for all,
less the control's (mean and standard error over clips); and how far its generated clips are from
the control's of the same captions and noise: the mean difference of a pixel, in levels of 255.
`control, other noise` is the control against itself with the noise of another seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch

from videorepa.artifacts.run import Run
from videorepa.backbones import Text
from videorepa.data.cache import Cache
from videorepa.data.source import open_source
from videorepa.data.video import read_all
from videorepa.lab.study.arms import clips_folder, run_folder
from videorepa.lab.study.recipe import BASE, StudyRecipe
from videorepa.prepare import prepare
from videorepa.recipe import Recipe
from videorepa.system.files import atomic_write, csv_text

FULL = Path(__file__).parents[1] / "recipes" / "micro" / "study.yaml"
TIMESTEPS = (50, 150, 300, 450, 600, 750, 900, 970)
BATCH = 24
WINDOW = 50
COMPARED = 128
"""Generated clips of each arm and seed that are looked at."""


class HeldOut:
    """Clips that no arm has seen, ready for the transformer."""

    def __init__(self, recipe: Recipe, clips: int, cache: Path) -> None:
        world = f"data.lab={{clips: {clips}, seed: 901}}"
        self.recipe = recipe.override(world, f"data.cache={cache}")
        prepare(self.recipe)
        stored = Cache(self.recipe)
        self.base = self.recipe.backbone.load(("transformer",), torch.device("cpu"), torch.float32)
        items = stored.ready(open_source(self.recipe.data).items)
        read = [stored.read_clip(item) for item in items]
        self.latents = torch.cat(
            [
                self.base.latents(moments[None], torch.Generator().manual_seed(number))
                for number, (moments, _) in enumerate(read)
            ]
        )
        self.text: Text = {key: torch.stack([text[key] for _, text in read]) for key in read[0][1]}

    @torch.no_grad()
    def losses(self, run: Path | None) -> np.ndarray:
        """Of every clip, mean over noise levels. run: None for the base model."""
        model = self.base
        if run is not None:
            model = Run.open(run).backbone(("transformer",), torch.device("cpu"), torch.float32)
        model.transformer.eval()
        found = np.zeros(len(self.latents))
        for level in TIMESTEPS:
            noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(level))
            for first in range(0, len(found), BATCH):
                part = slice(first, first + BATCH)
                text = {key: value[part] for key, value in self.text.items()}
                timestep = torch.full((len(self.latents[part]),), level)
                denoised = model.denoising_loss(self.latents[part], text, noise[part], timestep)
                found[part] += denoised.loss.numpy() / len(TIMESTEPS)
        return found


def logged(run: Path) -> dict[str, float]:
    rows = Run.open(run).log
    ends = {"align_first": rows[:WINDOW], "align_last": rows[-WINDOW:]}
    found = {key: float(np.mean([row["align"] for row in part])) for key, part in ends.items()}
    align, denoise, cosine = (
        float(np.mean([row[key] for row in rows]))
        for key in ("grad_align", "grad_denoise", "grad_cosine")
    )
    return found | {"gradient_ratio": align / denoise, "gradient_cosine": cosine}


def apart(clips: Path, others: Path) -> float:
    """Mean difference of a pixel between clips of the same name, in levels of 255."""
    names = sorted(path.name for path in clips.glob("*.mp4"))[:COMPARED]
    pairs = ((read_all(clips / name)[0], read_all(others / name)[0]) for name in names)
    return float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in pairs]))


def measured(study: StudyRecipe, out: Path, clips: int) -> Iterator[dict[str, object]]:
    made, trained = partial(clips_folder, out), partial(run_folder, out)
    held_out = HeldOut(study.recipe, clips, out / "held-out")
    control = study.control
    seeds = [s for s in study.seeds if (made(control, s) / "scores" / "summary.json").exists()]
    known = {(control, seed): held_out.losses(trained(control, seed)) for seed in seeds}
    known |= dict.fromkeys(((BASE, seed) for seed in seeds), held_out.losses(None))
    for arm in (BASE, *(name for name, about in study.arms.items() if about.table == "main")):
        done = [s for s in seeds if (made(arm, s) / "scores" / "summary.json").exists()]
        if not done:
            continue
        row: dict[str, object] = {"arm": arm, "seeds": len(done)}
        if (arm, done[0]) not in known:
            known |= {(arm, seed): held_out.losses(trained(arm, seed)) for seed in done}
        found = [known[arm, seed] for seed in done]
        row["held_out"] = np.mean(found)
        if arm != BASE:
            logs = [logged(trained(arm, seed)) for seed in done]
            row |= {key: np.mean([log[key] for log in logs]) for key in logs[0]}
        if arm != control:
            pairs = zip(found, done, strict=True)
            less = np.mean([mine - known[control, seed] for mine, seed in pairs], 0)
            row |= {"less_control": less.mean(), "error": less.std(ddof=1) / len(less) ** 0.5}
            row["apart"] = np.mean([apart(made(arm, s), made(control, s)) for s in done])
        yield row
    if len(seeds) > 1:
        far = apart(made(control, seeds[0]), made(control, seeds[1]))
        yield {"arm": f"{control}, other noise", "seeds": 2, "apart": far}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path)
    parser.add_argument("--recipe", type=Path, default=FULL)
    parser.add_argument("--clips", type=int, default=120)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    columns = ["arm", "seeds", "align_first", "align_last", "gradient_ratio", "gradient_cosine"]
    columns += ["held_out", "less_control", "error", "apart"]
    rows = []
    for row in measured(StudyRecipe.from_yaml(given.recipe), given.study, given.clips):
        rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        print(rows[-1], flush=True)
    if given.out:
        atomic_write(given.out, csv_text(columns, rows))


if __name__ == "__main__":
    main()
