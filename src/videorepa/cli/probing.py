"""Commands that measure what the features of models and teachers hold."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from videorepa.cli.options import Overrides, RecipeFile, Teachers, refuse


def scan(
    recipe: RecipeFile,
    out: Path,
    clips: int = 12,
    noise: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
    blocks: tuple[int, ...] = (),
    teacher: Teachers = (),
    set: Overrides = (),
) -> None:
    """Measure how close each block already is to the teacher, before choosing which to align.

    Trains nothing, and the clips need not be prepared. A second call resumes where the first one
    stopped. How well each block and the teacher predict contact is what `videorepa probe` measures.

    For example:
      videorepa scan recipes/videorepa-2b.yaml --out scans/2b
      videorepa scan recipes/videorepa-2b.yaml --out scans/2b --teacher videomae=other.pth

    Args:
      out: Folder of the table (scan.json, scan.csv) and its page (report.html).
      clips: How many of the recipe's clips to measure on.
      noise: Noise shares: how much of the noisy latents' variance is noise, 0 to 1.
      blocks: Numbers of the blocks, counted from 1; by default all.
    """
    from videorepa.probing.scan_table import table
    from videorepa.probing.sources import teachers_from
    from videorepa.recipe import Recipe
    from videorepa.scan import scan

    parsed = Recipe.from_yaml(recipe, set)
    measured = scan(
        parsed,
        out,
        teachers=teachers_from(teacher, parsed),
        clips=clips,
        noise_levels=noise,
        blocks=blocks or None,
    )
    print(table(measured))
    print(f"scan: {out / 'report.html'}")


def probe(
    recipe: RecipeFile,
    data: Path,
    out: Path,
    protocol: Literal["v1.5", "2021", "lab", "videorepa"] = "v1.5",
    models: tuple[Path, ...] = (),
    teacher: Teachers = (),
    blocks: tuple[int, ...] = (),
    timesteps: tuple[int, ...] = tuple(range(0, 501, 50)),
    draws: int = 3,
    steps: int | None = None,
    pools: tuple[int, ...] = (1, 4),
    frames: Literal["resampled", "published", "padded"] = "resampled",
    through_projector: bool = False,
    leave_out: Path | None = None,
    against: str = "base",
    set: Overrides = (),
) -> None:
    """Measure how well a linear readout of features predicts that objects will touch (Physion).

    The features are those of the recipe's untouched base model, its teacher and two straw men, and
    of further models and teachers. Only the readout is trained. A second call resumes where the
    first one stopped.

    For example:
      videorepa probe recipes/videorepa-2b.yaml --data physion_mp4s --out probes/2b
      videorepa probe recipes/videorepa-2b.yaml --data physion_mp4s --out p --models runs/aligned
      videorepa probe recipes/videorepa-2b.yaml --data physion_mp4s --out p --protocol videorepa
      videorepa probe src/videorepa/lab/demo.yaml --data build/contact --protocol lab --out p

    Args:
      data: Folder with Physion's `train` and `test`, or what `videorepa lab contact` drew.
      out: Folder of the tables (probe.json, accuracies.csv, differences.csv, predictions.csv).
      protocol: Physion's release, with the readout of its authors; `lab` for the lab's own clips;
        `videorepa` for v1.5 as VideoREPA's author read it, models with a projector through it.
      models: Further models: runs, recipes or diffusers folders, named like their folder or file.
      blocks: Numbers of the blocks, counted from 1; by default those that the recipe aligns.
      timesteps: Timesteps of the noise that models see, 0 to 999.
      draws: How many draws of noise each clip is read with.
      steps: How many evenly spaced steps in time are read; by default 3, or as the protocol says.
      pools: Rows and columns that each step is averaged to; each size gets a readout of its own.
      frames: Take frames evenly from all that Physion shows, only those that published extractors
        see, or each frame once after copies of the first.
      through_projector: Read the further models after the projectors that were trained on their
        blocks; the base model has none.
      leave_out: A text file with the name of a test clip a line, such as the faulty ones.
      against: The source that the others are compared with.
    """
    from videorepa.probe import probe, read_names
    from videorepa.probing.probe_table import table
    from videorepa.probing.sources import models_by_name, teachers_from
    from videorepa.recipe import Recipe

    parsed = Recipe.from_yaml(recipe, set)
    measured = probe(
        parsed,
        data,
        out,
        protocol=protocol,
        models=models_by_name(models),
        teachers=teachers_from(teacher, parsed),
        blocks=blocks or None,
        timesteps=timesteps,
        draws=draws,
        steps=steps,
        pools=pools,
        frames=frames,
        through_projector=through_projector,
        leave_out=read_names(leave_out) if leave_out else (),
        against=against,
    )
    print(table(measured))
    print(f"probe: {out}")
    refuse(measured.failures, "clip", "could not be read; the tables are of the others.")


def likelihood(
    recipe: RecipeFile,
    pairs: Path,
    out: Path,
    models: tuple[Path, ...] = (),
    noise: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
    against: str = "base",
    straw_man: bool = True,
    as_published: bool = False,
    set: Overrides = (),
) -> None:
    """Ask models which of two clips they find likelier, the real one or one that breaks a law.

    The likelier clip is the one with the smaller denoising loss under the same noise, timesteps and
    caption (LikePhys). Nothing is generated and nothing is trained. A second call resumes where the
    first one stopped.

    For example:
      videorepa likelihood recipes/videorepa-2b.yaml --pairs LikePhys-Benchmark --out likely
      videorepa likelihood recipes/videorepa-2b.yaml --pairs pairs.csv --out l --models runs/aligned

    Args:
      pairs: A .csv file with the columns real, broken and caption, and perhaps id, law and degree;
        or the folder of LikePhys's clips.
      out: Folder of the scores, `likelihood/MODEL` for each model.
      models: Further models: runs, recipes or diffusers folders, named like their folder or file.
      noise: Noise shares: how much of the noisy latents' variance is noise, 0 to 1.
      against: The model that the others are compared with.
      straw_man: Ask an untrained copy of the base model too.
      as_published: Compute what LikePhys's released code seems to, in place of the denoising loss.
    """
    from videorepa.evaluation.tables import table
    from videorepa.likelihood import likelihood
    from videorepa.probing.sources import models_by_name
    from videorepa.recipe import Recipe

    results = likelihood(
        Recipe.from_yaml(recipe, set),
        pairs,
        out,
        models=models_by_name(models),
        noise_levels=noise,
        against=against,
        straw_man=straw_man,
        as_published=as_published,
    )
    print(table(results, by_scenario=True))
    print(f"likelihood: {out}")
    failed = {f.prompt_id: f.reason for scores in results.values() for f in scores.summary.failures}
    refuse(failed, "pair", "could not be scored; the tables are of the others.")
