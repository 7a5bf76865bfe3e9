"""Commands that make, score and show clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from videorepa.cli.options import Positional, Settings, Shard, parse_shard
from videorepa.errors import UserError


def generate(
    model: Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]],
    prompts: Path,
    out: Path,
    samples: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    backbone: str = "cogvideox",
    column: str | None = None,
    step: int | None = None,
    seed: int = 0,
    shard: Shard = "0/1",
) -> None:
    """Generate an mp4 file with a JSON sidecar for every prompt.

    The noise depends on the prompt, the sample's number and --seed alone, so that two models can be
    compared clip by clip. Goes on where it stopped.

    For example:
      videorepa generate runs/videorepa-2b --prompts prompts.txt --out clips/aligned
      videorepa generate recipes/videorepa-2b.yaml --prompts prompts.txt --out clips/base
      videorepa generate runs/videorepa-2b --prompts refined.csv --column detailed --out clips/long

    Args:
      model: A run, a recipe (its untouched base model), a diffusers folder, or `micro`.
      prompts: A .txt file with a prompt a line, or a .csv or .jsonl file.
      out: Folder of the clips.
      samples: Clips per prompt; by default as the recipe says, as the next two.
      steps: Denoising steps.
      guidance_scale: Strength of classifier-free guidance.
      backbone: Kind of a diffusers folder; runs and recipes say it themselves.
      column: Where the text to generate from stands, such as `detailed`; `evaluate` then still
        scores against `caption`. By default it is that, or `prompt`.
      step: The run's checkpoint to take; by default the newest.
      seed: Another one gives every clip other noise.
    """
    from videorepa.artifacts.model import default_settings
    from videorepa.data.manifest import read_prompts
    from videorepa.generate import generate

    given = {"samples": samples, "steps": steps, "guidance_scale": guidance_scale}
    changed = {key: value for key, value in given.items() if value is not None}
    clips = generate(
        model,
        read_prompts(prompts, column),
        out,
        settings=default_settings(model, backbone).changed(**changed),
        backbone=backbone,
        step=step,
        seed=seed,
        shard=parse_shard(shard),
    )
    print(f"{len(clips)} clips in {out}")


def refine(
    prompts: Positional[Annotated[Path, tyro.conf.arg(metavar="PROMPTS")]],
    out: Path,
    model: str,
    endpoint: str | None = None,
) -> None:
    """Have a language model rewrite short prompts in detail, as video models were trained.

    `generate --column detailed` then generates from what `out` holds. A row is written as it comes
    and not asked for again. The key of a server, if it wants one, is the environment variable
    VIDEOREPA_API_KEY.

    For example:
      videorepa refine prompts.txt --out refined.csv --endpoint http://localhost:8000/v1 --model m
      videorepa refine prompts.txt --out refined.csv --model Qwen2.5-7B-Instruct

    Args:
      prompts: A .txt file with a prompt a line, or a .csv or .jsonl file with a `caption` or
        `prompt`.
      out: The .csv file to write.
      model: The server's name of a model; or the folder of one that transformers loads.
      endpoint: Address of an OpenAI-compatible server; without one the model runs here.
    """
    from videorepa.data.manifest import read_prompts
    from videorepa.refine import refine

    found = refine(read_prompts(prompts), out, model=model, endpoint=endpoint)
    print(f"{len(found.rows)} refined prompts in {out}, {found.asked} of them new")
    if found.failed:
        raise UserError(
            f"{len(found.failed)} prompts could not be refined; the same command asks for them "
            "again.\n" + "\n".join(f"  {name!r}: {why}" for name, why in found.failed.items())
        )


def evaluate(
    benchmark: Positional[str],
    videos: Positional[Path],
    out: Path | None = None,
    against: Path | None = None,
    ratings: tuple[Path, ...] = (),
    shard: Shard = "0/1",
    set: Settings = (),
) -> None:
    """Score a folder of generated clips; print a table with 95 % intervals.

    Goes on where it stopped.

    For example:
      videorepa evaluate lab clips/aligned
      videorepa evaluate lab clips/aligned --against clips/control
      videorepa evaluate videophy clips/aligned --set captions=videophy.csv
      videorepa evaluate rated clips/aligned --against clips/control --ratings ratings-ada.json

    Args:
      benchmark: Name of the benchmark, such as `lab`; `rated` counts blind ratings.
      videos: Folder that `generate` wrote; or a .csv or .jsonl file that lists videos and captions.
      out: Folder of the scores; by default `scores` in the folder of the clips.
      against: Another such folder, of the same prompts and seeds, to compare with pair by pair.
      ratings: Files that the report's page saved, one for each rater; for `rated` alone.
    """
    from videorepa.evaluate import evaluate
    from videorepa.evaluation.ratings import rated
    from videorepa.evaluation.tables import table
    from videorepa.system.files import short_name

    if (benchmark == "rated") != bool(ratings) or (ratings and against is None):
        raise UserError(
            "Blind ratings need all three: evaluate rated CLIPS --against CLIPS --ratings FILE."
        )
    part = parse_shard(shard)
    if against is not None and ratings:
        found = rated(videos, against, ratings, out)
    else:
        found = evaluate(benchmark, videos, out, against=against, settings=set, shard=part)
    print(table({short_name(videos): found}, by_scenario=True))
    if part[1] > 1:
        print(
            "This is one shard. After the last, the same command without --shard gives the table."
        )
    print(f"scores: {found.folder}")
    failures = found.summary.failures
    if failures:
        raise UserError(
            f"{len(failures)} clips could not be scored; the table is of the others.\n"
            + "\n".join(f"  {f.prompt_id!r} {f.k}: {f.reason}" for f in failures)
        )


def report(
    runs: Positional[tuple[Path, ...]],
    out: Path = Path("report.html"),
    clips: tuple[Path, ...] = (),
    scan: tuple[Path, ...] = (),
    probe: tuple[Path, ...] = (),
) -> None:
    """Write one HTML page: tables, curves, clips side by side, and blind rating of them.

    Many clips are put beside the page, into NAME-files; few are within it.

    For example:
      videorepa report runs/aligned runs/control --clips clips/base clips/control clips/aligned
      videorepa evaluate rated clips/aligned --against clips/control --ratings ratings-ada.json

    Args:
      runs: Folders that `train` wrote.
      out: The page.
      clips: Folders that `generate` wrote, or lists of clips from elsewhere, as `evaluate` takes
        them; where `evaluate` has scored them, scores are shown too.
      scan: Folders that `scan` wrote.
      probe: Folders that `probe` wrote.
    """
    from videorepa.artifacts.scores import score_folders
    from videorepa.report import report
    from videorepa.system.files import short_name

    folders = {short_name(folder): folder for folder in clips}
    if len(folders) < len(clips):
        folders = {str(folder): folder for folder in clips}
    scores = {name: score_folders(folder) for name, folder in folders.items()}
    page = report(runs, out, generations=folders, scores=scores, scans=scan, probes=probe)
    print(f"report: {page}")
