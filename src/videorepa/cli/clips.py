"""Commands that make, score and show clips."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from videorepa.cli.options import Positional, Settings, Shard, parse_shard, refuse
from videorepa.errors import UserError
from videorepa.system.wording import count


def generate(
    model: Positional[Annotated[Path, tyro.conf.arg(metavar="MODEL")]],
    prompts: Path,
    out: Path,
    samples: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    backbone: str | None = None,
    column: str | None = None,
    images: Path | None = None,
    step: int | None = None,
    seed: int = 0,
    offload: Literal["none", "model", "group"] = "none",
    shard: Shard = "0/1",
    set: Settings = (),
) -> None:
    """Generate an mp4 file with a JSON sidecar for every prompt.

    The noise depends on the prompt, the sample's number and --seed alone, so that two models can be
    compared clip by clip. A second call resumes where the first one stopped.

    A benchmark's name in place of the prompts takes all of its own, with their first frames where
    it has them. Clips then get the length that it scores, and as many samples as it asks for;
    docs/generating.md says more.

    For example:
      videorepa generate runs/videorepa-2b --prompts prompts.txt --out clips/aligned
      videorepa generate recipes/videorepa-2b.yaml --prompts prompts.txt --out clips/base
      videorepa generate runs/videorepa-2b --prompts refined.csv --column detailed --out clips/long
      videorepa generate runs/i2v --prompts physics_iq --set data=physics-IQ-benchmark --out iq

    Args:
      model: A run, a recipe (its untouched base model), a diffusers folder, `micro` or `micro-i2v`.
      prompts: A .txt file with a prompt a line, or a .csv or .jsonl file; or the name of a
        benchmark, whose keys --set sets as for `evaluate`.
      out: Folder of the clips.
      samples: Clips per prompt; by default as the benchmark asks for, or as the recipe says.
      steps: Denoising steps; by default as the recipe says.
      guidance_scale: Strength of classifier-free guidance; by default as the recipe says.
      backbone: Family of a diffusers folder, such as `wan`; by default the one that loads its
        pipeline. Runs and recipes state it themselves.
      column: Column of the texts, such as `detailed`; by default `caption`, or else `prompt`.
        Scores are always against `caption`.
      images: Folder of first frames, for models that continue an image: those that the list's
        column `image` names, or else files called by the prompts' ids. By default the column's
        paths start from the list's folder.
      step: Step of the run's checkpoint to use; by default the newest.
      seed: Another seed gives every clip different noise.
      offload: What waits in main memory while it does not run: `model` keeps one model at a time on
        the GPU, `group` one layer of the transformer. The clips are the same.
    """
    from videorepa.artifacts.model import default_settings
    from videorepa.data.manifest import read_prompts
    from videorepa.generate import generate
    from videorepa.settings import plugins

    bench = None
    if str(prompts) in plugins.names("benchmarks") and not prompts.exists():
        if column or images:
            raise UserError(
                f"--column and --images are for lists of prompts; {prompts} has its own. Leave "
                "them out."
            )
        bench = plugins.benchmark(str(prompts), set)
    elif set:
        raise UserError(
            f"--set is for a benchmark's prompts, and {prompts} is the name of none. Leave it out."
        )
    settings = default_settings(model, backbone)
    asked = bench.form(settings.fps).samples if bench else None
    options = {
        "samples": asked if samples is None else samples,
        "steps": steps,
        "guidance_scale": guidance_scale,
    }
    changed = {key: value for key, value in options.items() if value is not None}
    clips = generate(
        model,
        bench.every_prompt()
        if bench
        else read_prompts(prompts, column, with_images=True, images=images),
        out,
        settings=settings.changed(**changed),
        backbone=backbone,
        step=step,
        seed=seed,
        offload=offload,
        shard=parse_shard(shard),
        benchmark=bench,
    )
    print(f"{count(len(clips), 'clip')} in {out}")


def refine(
    prompts: Positional[Annotated[Path, tyro.conf.arg(metavar="PROMPTS")]],
    out: Path,
    model: str,
    endpoint: str | None = None,
    first_frame: str | None = None,
) -> None:
    """Have a language model turn short prompts into detailed ones, as video models are trained on.

    The command `generate --column detailed` then generates from the result. Each answer is written
    at once, and a second call asks only for those that are missing. If a server needs a key, set
    the environment variable VIDEOREPA_API_KEY.

    For example:
      videorepa refine prompts.txt --out refined.csv --endpoint http://localhost:8000/v1 --model m
      videorepa refine prompts.txt --out refined.csv --model Qwen2.5-7B-Instruct

    Args:
      prompts: A .txt file with a prompt a line, or a .csv or .jsonl file with captions or prompts.
      out: The .csv file to write.
      model: With --endpoint, the server's name of a model; otherwise a transformers folder.
      endpoint: Address of an OpenAI-compatible server; by default the model runs here.
      first_frame: For prompts that continue images, the column that describes each image, which the
        model reads beside the caption.
    """
    from videorepa.data.manifest import read_prompts
    from videorepa.refine import refine

    refined = refine(
        read_prompts(prompts), out, model=model, endpoint=endpoint, first_frame=first_frame
    )
    print(f"{len(refined.rows)} refined prompts in {out}, {refined.asked} of them new")
    refuse(refined.failed, "prompt", "could not be refined. The same command asks again.")


def evaluate(
    benchmark: Positional[Annotated[str, tyro.conf.arg(metavar="BENCHMARK")]],
    videos: Positional[Annotated[Path, tyro.conf.arg(metavar="VIDEOS")]],
    out: Path | None = None,
    against: Path | None = None,
    ratings: tuple[Path, ...] = (),
    shard: Shard = "0/1",
    set: Settings = (),
) -> None:
    """Score a folder of generated clips, and print a table with 95 % intervals.

    A second call resumes where the first one stopped. The benchmarks, and what they need beside the
    clips; docs/judging.md says what each costs and what it has been compared with:
      lab: nothing. It measures laws in clips of the lab's world.
      continuation: nothing. For continuations of first frames of the lab's world.
      phyworld: nothing. For continuations by models that were trained on its tasks.
      physics_iq, physics_iq_verified: films of experiments. For continuations, not text alone.
      videophy, videophy2: a judge of 14 GB and the list of captions.
      videoscore2: a judge of 17 GB, and its instruction.
      phyjudge: a judge of 18 GB with its LoRA, its instruction, and the laws of each prompt.
      vbench: DINO and two CLIPs.
      vbench_results: result files of VBench's own tool, and no clips.
      surprise: V-JEPA 2 with its predictor, and nothing about the prompts.
      rated: files of blind ratings.
      agreement: scores, and people's ratings of the same clips. It judges the judge.

    For example:
      videorepa evaluate lab clips/aligned
      videorepa evaluate lab clips/aligned --against clips/control
      videorepa evaluate videophy clips/aligned --set captions=videophy.csv
      videorepa evaluate rated clips/aligned --against clips/control --ratings ratings-ada.json
      videorepa evaluate agreement phyground.csv --ratings phyground/annotations

    Args:
      benchmark: Name of the benchmark, such as `lab`; `rated` counts blind ratings, and `agreement`
        compares scores with ratings.
      videos: Folder that `generate` wrote; or a .csv or .jsonl file that lists videos and captions;
        or a folder in the layout of the benchmark's authors, for those that have one.
      out: Folder of the scores; by default `scores` in the folder of the clips, or
        `scores-BENCHMARK` where that holds another benchmark's.
      against: Another such folder, of the same prompts and seeds, to compare with pair by pair.
      ratings: For `rated`, files that the report's page saved, one for each rater. For `agreement`,
        people's ratings: PhyGround's annotations, VideoPhy's table or one of your own.
    """
    from videorepa.evaluate import evaluate
    from videorepa.evaluation.agreement import agreement
    from videorepa.evaluation.ratings import rated
    from videorepa.evaluation.tables import table
    from videorepa.system.files import short_name

    if benchmark == "rated" and not (ratings and against):
        raise UserError(
            "Blind ratings need all three: evaluate rated CLIPS --against CLIPS --ratings FILE."
        )
    if (benchmark in ("rated", "agreement")) != bool(ratings):
        raise UserError(
            "--ratings is for two benchmarks, which need it: evaluate agreement CLIPS --ratings "
            "FILE, and evaluate rated CLIPS --against CLIPS --ratings FILE."
        )
    part = parse_shard(shard)
    if benchmark == "agreement":
        scores = agreement(videos, ratings, out, against=against, settings=set)
    elif against is not None and ratings:
        scores = rated(videos, against, ratings, out)
    else:
        scores = evaluate(benchmark, videos, out, against=against, settings=set, shard=part)
    print(table({short_name(videos): scores}, by_scenario=True))
    if part[1] > 1:
        print(
            "This is one shard. When all are done, the same command without --shard prints the "
            "whole table."
        )
    print(f"scores: {scores.folder}")
    failures = {f"{f.prompt_id} {f.k}": f.reason for f in scores.summary.failures}
    if scores.comparison is not None:
        theirs = f"{short_name(against)}: " if against else ""
        failures |= {f"{theirs}{f.prompt_id} {f.k}": f.reason for f in scores.comparison.failures}
    refuse(failures, "clip", "could not be scored; the table is of the others.")


def select(
    videos: Positional[Annotated[Path, tyro.conf.arg(metavar="VIDEOS")]],
    out: Path,
    by: Path,
    column: str | None = None,
    judged_by: Path | None = None,
    judged_column: str | None = None,
    most: int | None = None,
) -> None:
    """Choose the best of each prompt's clips by a score, and print what choosing among n does.

    The curve is the expected score of the best of n clips, over all subsets of a prompt's clips. A
    score's own curve always rises; --judged-by says what the choice does to another score. Motion
    is shown beside it, since a still clip can win. The benchmark says whether more or less is
    better.

    For example:
      videorepa generate runs/aligned --prompts prompts.txt --out clips/aligned --samples 8
      videorepa evaluate surprise clips/aligned --out clips/aligned/surprise
      videorepa select clips/aligned --by clips/aligned/surprise --column surprise --out clips/best

    Args:
      videos: Folder that `generate` wrote, with several samples of each prompt.
      out: Folder of the chosen clips, which `evaluate` and `report` read as any other.
      by: Folder of the scores to choose by, which `evaluate` wrote for these clips.
      column: Column of its rows to choose by; for a wrong one the error lists all.
      judged_by: Folder of other scores of the same clips, to judge the choice by.
      judged_column: Column of its rows to judge by.
      most: The curve's last n; by default the most clips that a prompt has. Prompts with fewer are
        left out of the curve, and named.
    """
    from videorepa.evaluation.tables import best_of_table
    from videorepa.select import select

    selection = select(
        videos,
        out,
        by=by,
        column=column,
        judged_by=judged_by,
        judged_column=judged_column,
        most=most,
    )
    print(best_of_table(selection))
    print(f"clips: {out}")


def report(
    runs: Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[RUN ...]")]],
    out: Path = Path("report.html"),
    clips: tuple[Path, ...] = (),
    scan: tuple[Path, ...] = (),
    probe: tuple[Path, ...] = (),
    likelihood: tuple[Path, ...] = (),
) -> None:
    """Write one HTML page with tables, curves, clips side by side, and a blind rating of them.

    A few clips are embedded in the page. Many are put beside it, into the folder NAME-files.

    For example:
      videorepa report runs/aligned runs/control --clips clips/base clips/control clips/aligned
      videorepa evaluate rated clips/aligned --against clips/control --ratings ratings-ada.json

    Args:
      runs: Folders that `train` wrote.
      out: The page.
      clips: Folders that `generate` or `select` wrote, or lists of clips as for `evaluate`.
        If `evaluate` has scored them, the page shows the scores too.
      scan: Folders that `scan` wrote.
      probe: Folders that `probe` wrote.
      likelihood: Folders that `likelihood` wrote.
    """
    from videorepa.artifacts.scores import score_folders
    from videorepa.report import report
    from videorepa.system.files import short_name

    folders = {short_name(folder): folder for folder in clips}
    if len(folders) < len(clips):
        folders = {str(folder): folder for folder in clips}
    scores = {name: score_folders(folder) for name, folder in folders.items()}
    page = report(
        runs,
        out,
        generations=folders,
        scores=scores,
        scans=scan,
        probes=probe,
        likelihoods=likelihood,
    )
    print(f"report: {page}")
