"""Measures what alignment did to the arms of a study, and how different their clips are.

Run: python experiments/arms.py STUDY [--recipe FILE] [--out docs/study/arms.csv]

There is a row for every arm of the main table that is done, over the seeds that are done:

- align_first, align_last: the alignment loss, as a mean over the first and the last 50 steps
- gradient_ratio: the norm of the weighted alignment loss's gradient at the tapped block, over that
  of the denoising loss's, each as a mean over steps
- gradient_cosine: the cosine of these two gradients, as a mean over steps
- held_out: the denoising loss on clips that no arm was trained on, at eight noise levels, with the
  same noise for all arms
- less_control, error: that loss less the control's, as a mean over clips, and its standard error
- apart: the mean difference between the pixels of the arm's and the control's clips of the same
  captions and noise, in levels of 255

The row `control, other noise` compares the control's clips with those of another seed's noise.
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
from videorepa.data.loader import PreparedClips
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
"""Generated clips to compare for each arm and seed."""


class HeldOut:
    """Clips that no arm was trained on, encoded for the transformer."""

    def __init__(self, recipe: Recipe, clips: int, cache: Path) -> None:
        world = f"data.lab={{clips: {clips}, seed: 901}}"
        self.recipe = recipe.override(world, f"data.cache={cache}")
        prepare(self.recipe)
        prepared = PreparedClips(self.recipe)
        self.base = self.recipe.backbone.load(("transformer",), torch.device("cpu"), torch.float32)
        read = [prepared.cache.read_clip(clip) for clip in prepared.clips]
        self.latents = torch.cat(
            [
                self.base.latents(moments[None], torch.Generator().manual_seed(number))
                for number, (moments, _) in enumerate(read)
            ]
        )
        self.text: Text = {key: torch.stack([text[key] for _, text in read]) for key in read[0][1]}

    @torch.no_grad()
    def losses(self, run: Path | None) -> np.ndarray:
        """The denoising loss of every clip, as a mean over noise levels.

        Args:
            run: The run to load, or None for the base model.
        """
        model = self.base
        if run is not None:
            model = Run.open(run).backbone(("transformer",), torch.device("cpu"), torch.float32)
        model.transformer.eval()
        losses = np.zeros(len(self.latents))
        for level in TIMESTEPS:
            noise = torch.randn(self.latents.shape, generator=torch.Generator().manual_seed(level))
            for first in range(0, len(losses), BATCH):
                part = slice(first, first + BATCH)
                text = {key: value[part] for key, value in self.text.items()}
                timestep = torch.full((len(self.latents[part]),), level)
                denoised = model.denoising_loss(self.latents[part], text, noise[part], timestep)
                losses[part] += denoised.loss.numpy() / len(TIMESTEPS)
        return losses


def logged(run: Path) -> dict[str, float]:
    """The columns that follow from a run's log."""
    rows = Run.open(run).log
    ends = {"align_first": rows[:WINDOW], "align_last": rows[-WINDOW:]}
    losses = {key: float(np.mean([row["align"] for row in part])) for key, part in ends.items()}
    align, denoise, cosine = (
        float(np.mean([row[key] for row in rows]))
        for key in ("grad_align", "grad_denoise", "grad_cosine")
    )
    return losses | {"gradient_ratio": align / denoise, "gradient_cosine": cosine}


def apart(clips: Path, others: Path) -> float:
    """Mean absolute difference between the pixels of clips of the same name, in levels of 255."""
    names = sorted(path.name for path in clips.glob("*.mp4"))[:COMPARED]
    pairs = ((read_all(clips / name)[0], read_all(others / name)[0]) for name in names)
    return float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in pairs]))


def measure(study: StudyRecipe, out: Path, clips: int) -> Iterator[dict[str, object]]:
    """The rows. `clips` is the number of held-out clips."""
    made, trained = partial(clips_folder, out), partial(run_folder, out)
    held_out = HeldOut(study.recipe, clips, out / "held-out")
    control = study.control
    seeds = [s for s in study.seeds if (made(control, s) / "scores" / "summary.json").exists()]
    losses = {(control, seed): held_out.losses(trained(control, seed)) for seed in seeds}
    losses |= dict.fromkeys(((BASE, seed) for seed in seeds), held_out.losses(None))
    for arm in (BASE, *(name for name, about in study.arms.items() if about.table == "main")):
        done = [s for s in seeds if (made(arm, s) / "scores" / "summary.json").exists()]
        if not done:
            continue
        row: dict[str, object] = {"arm": arm, "seeds": len(done)}
        if (arm, done[0]) not in losses:
            losses |= {(arm, seed): held_out.losses(trained(arm, seed)) for seed in done}
        own = [losses[arm, seed] for seed in done]
        row["held_out"] = np.mean(own)
        if arm != BASE:
            logs = [logged(trained(arm, seed)) for seed in done]
            row |= {key: np.mean([log[key] for log in logs]) for key in logs[0]}
        if arm != control:
            pairs = zip(own, done, strict=True)
            less = np.mean([loss - losses[control, seed] for loss, seed in pairs], 0)
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
    arguments = parser.parse_args()
    columns = ["arm", "seeds", "align_first", "align_last", "gradient_ratio", "gradient_cosine"]
    columns += ["held_out", "less_control", "error", "apart"]
    rows = []
    for row in measure(StudyRecipe.from_yaml(arguments.recipe), arguments.study, arguments.clips):
        rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        print(rows[-1], flush=True)
    if arguments.out:
        atomic_write(arguments.out, csv_text(columns, rows))


if __name__ == "__main__":
    main()
