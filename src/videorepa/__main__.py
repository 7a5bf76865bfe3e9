"""The command line: every verb with its arguments, examples and plain errors."""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from videorepa.errors import UserError

# Heavy libraries are imported inside the verbs: --help has to answer at once.
# An "Examples:" heading would be taken for a section of the docstring and left out of the help.
Positional = tyro.conf.Positional
RecipeFile = Positional[Annotated[Path, tyro.conf.arg(metavar="RECIPE", help="A YAML file.")]]
Shard = Annotated[str, tyro.conf.arg(metavar="I/N", help="Do the I-th of N parts, from 0.")]
Overrides = tyro.conf.UseAppendAction[
    Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="KEY=VALUE",
            help="Change a key of the recipe: `--set seed=1`. Keys with a dot can be options "
            "themselves: `--align.weight 0.45`. Can be given many times.",
        ),
    ]
]
Settings = tyro.conf.UseAppendAction[
    Annotated[
        tuple[str, ...],
        tyro.conf.arg(
            metavar="KEY=VALUE",
            help="A setting of the benchmark, such as `--set captions=videophy.csv`. Can be given "
            "many times.",
        ),
    ]
]


def prepare(recipe: RecipeFile, shard: Shard = "0/1", set: Overrides = ()) -> None:
    """Turn videos and captions into a cache of latents, text embeddings and teacher features.

    Goes on where it stopped. A clip that cannot be used is reported and costs that clip alone.
    Any key of the recipe can be changed on the command line: --train.precision float32.

    For example:
      videorepa prepare recipes/videorepa-2b.yaml
      videorepa prepare recipes/videorepa-2b.yaml --shard 1/4
    """
    from videorepa.prepare import prepare
    from videorepa.recipe import Recipe

    done = prepare(Recipe.from_yaml(recipe, set), shard=_shard(shard))
    print(f"prepared {done.made}, found {done.found} done before, failed {len(done.failed)}")
    if done.failed:
        raise UserError(
            f"{len(done.failed)} clips cannot be used; training goes without them. Mend them and "
            "run the same command again, or leave them out.\n"
            + "\n".join(f"  {name!r}: {reason}" for name, reason in done.failed.items())
        )


def head(
    recipe: RecipeFile,
    kind: Literal["motion", "saliency"],
    out: Path,
    clips: int = 200,
    set: Overrides = (),
) -> None:
    """Train a small head on the recipe's teacher: features of motion, or a saliency of each token.

    It learns from the optical flow of the recipe's clips, and says how well it predicts that of
    clips held out. The recipe's `encoder` can be the plain teacher, or the `headed` one that is to
    have this head. Stopped, it starts over.

    For example:
      videorepa head recipes/videorepa-2b.yaml --kind motion --out heads/motion.safetensors

    Args:
      kind: "motion" for the loss moalign, "saliency" for sara.
      out: The file to write; must not exist yet.
      clips: Use at most so many clips.
    """
    from videorepa.heads import train_head
    from videorepa.recipe import Recipe

    trained = train_head(Recipe.from_yaml(recipe, set), kind, out, clips=clips)
    print(trained)
    if trained.failed:
        raise UserError(
            f"{len(trained.failed)} clips could not be used; the head was trained without them.\n"
            + "\n".join(f"  {name!r}: {reason}" for name, reason in trained.failed.items())
        )


def train(recipe: RecipeFile, out: Path | None = None, set: Overrides = ()) -> None:
    """Fine-tune with the recipe's alignment loss; the same command resumes exactly.

    Any key of the recipe can be changed on the command line: `--align.weight 0` is the control.

    For example:
      videorepa train recipes/videorepa-2b.yaml
      videorepa train recipes/videorepa-2b.yaml --align.weight 0 --out runs/control

    Args:
      out: Folder of the run; by default runs/NAME, with the recipe's name.
    """
    from videorepa.recipe import Recipe
    from videorepa.train import train

    parsed = Recipe.from_yaml(recipe, set)
    run = train(parsed, out or Path("runs") / parsed.name)
    print(f"trained: {run.path}")


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
    from videorepa.data.manifest import read_prompts
    from videorepa.generate import default_settings, generate

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
        shard=_shard(shard),
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
    from videorepa.data.files import short_name
    from videorepa.evaluate import evaluate, table
    from videorepa.report.ratings import rated

    if (benchmark == "rated") != bool(ratings) or (ratings and against is None):
        raise UserError(
            "Blind ratings need all three: evaluate rated CLIPS --against CLIPS --ratings FILE."
        )
    part = _shard(shard)
    if against is not None and ratings:
        found = rated(videos, against, ratings, out)
    else:
        found = evaluate(benchmark, videos, out, against=against, settings=set, shard=part)
    print(table({short_name(videos): found}, by_scenario=True))
    if part[1] > 1:
        print(
            "This is one shard. After the last, the same command without --shard gives the table."
        )
    print(f"scores: {found.out}")
    failures = found.summary["failures"]
    if failures:
        raise UserError(
            f"{len(failures)} clips could not be scored; the table is of the others.\n"
            + "\n".join(f"  {f['prompt_id']!r} {f['k']}: {f['reason']}" for f in failures)
        )


def export(
    run: Positional[Path],
    out: Positional[Path],
    dtype: Literal["float32", "bfloat16"] = "float32",
    format: Literal["diffusers", "comfyui"] = "diffusers",
    fuse: bool = False,
    scores: tuple[Path, ...] = (),
) -> None:
    """Write what a run has trained as a folder (or LoRA file) that plain diffusers loads.

    The result is reloaded by stock diffusers in a process of its own and its output compared.

    For example:
      videorepa export runs/videorepa-2b exported
      videorepa export runs/videorepa-5b for-comfyui --format comfyui
      videorepa export runs/videorepa-5b whole --fuse --scores clips/aligned/scores

    Args:
      run: Folder that `train` wrote.
      out: Folder to write; must not exist yet.
      dtype: Of the written weights.
      format: Layout of a LoRA.
      fuse: Fold a LoRA into the weights and write the whole transformer.
      scores: Folders that `evaluate` wrote, for the model card; by default those in the run.
    """
    import torch

    from videorepa.export import export

    product = export(run, out, dtype=getattr(torch, dtype), format=format, fuse=fuse, scores=scores)
    print(f"exported and checked: {product}")


def import_(
    source: Positional[Annotated[str, tyro.conf.arg(metavar="SRC")]],
    out: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]],
    alpha: float | None = None,
    base: str | None = None,
) -> None:
    """Bring published VideoREPA weights into files that plain diffusers loads.

    A transformer's folder or a DeepSpeed ZeRO-2 checkpoint gives a stock transformer and the
    projector in a file of its own; a LoRA file gets the alpha that it lacks.

    For example:
      videorepa import VideoREPA-2B imported
      videorepa import VideoREPA-5B/pytorch_lora_weights.safetensors imported --alpha 64
      videorepa import checkpoint-4000 imported --base zai-org/CogVideoX-2b

    Args:
      source: A path or a Hub id.
      out: Folder to write; must not exist yet.
      alpha: Of a LoRA, which is applied at alpha / rank; VideoREPA-5B was trained with 64.
      base: What a DeepSpeed checkpoint was trained from; by default CogVideoX-2B.
    """
    from videorepa.import_weights import import_weights

    found = import_weights(source, out, alpha=alpha, base=base)
    print(f"imported: {found.product}")
    if found.projector is not None:
        print(f"projector: {found.projector}")


def inspect(recipe: RecipeFile, set: Overrides = (), device: str | None = None) -> None:
    """Print shapes, parameters, disk space, peak memory and work of a recipe; loads nothing.

    Memory is predicted for the device, cpu or cuda, which need not be here.

    For example:
      videorepa inspect recipes/videorepa-2b.yaml --device cuda
      videorepa inspect recipes/videorepa-2b.yaml --data.frames 25 --encoder.frames 24
    """
    from videorepa.inspect import inspect
    from videorepa.recipe import Recipe

    print(inspect(Recipe.from_yaml(recipe, set), device=device))


def scan(
    recipe: RecipeFile,
    out: Path,
    clips: int = 12,
    noise: tuple[float, ...] = (0.1, 0.3, 0.5, 0.7, 0.9),
    blocks: tuple[int, ...] = (),
    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    probe_clips: int = 256,
    set: Overrides = (),
) -> None:
    """Measure how close each block already is to the teacher, before choosing which to align.

    Also how well a linear probe reads contact from them, where the clips are of the lab's size.
    Trains nothing, and nothing need be prepared; goes on where it stopped.

    For example:
      videorepa scan recipes/videorepa-2b.yaml --out scans/2b
      videorepa scan recipes/videorepa-2b.yaml --out scans/2b --teacher videomae=other.pth

    Args:
      out: Folder of the table (scan.json, scan.csv) and its page (report.html).
      clips: How many of the recipe's clips to measure on.
      noise: Noise levels: the share of the noisy latents' variance that is noise.
      blocks: Which blocks, counted from 1; by default all.
      teacher: NAME=WEIGHTS or NAME=WEIGHTS,KEY=VALUE of one more teacher. Can be given many times.
      probe_clips: Clips that contact is read from; 0 leaves it out.
    """
    from videorepa.recipe import Recipe
    from videorepa.scan import scan, table, teachers_from

    parsed = Recipe.from_yaml(recipe, set)
    found = scan(
        parsed,
        out,
        teachers=teachers_from(teacher, parsed),
        clips=clips,
        noise_levels=noise,
        blocks=blocks or None,
        probe_clips=probe_clips,
    )
    print(table(found))
    print(f"scan: {out / 'report.html'}")


def probe(
    recipe: RecipeFile,
    data: Path,
    out: Path,
    protocol: Literal["v1.5", "2021", "lab"] = "v1.5",
    models: tuple[Path, ...] = (),
    teacher: tyro.conf.UseAppendAction[tuple[str, ...]] = (),
    blocks: tuple[int, ...] = (),
    timesteps: tuple[int, ...] = tuple(range(0, 501, 50)),
    draws: int = 3,
    steps: int = 3,
    pools: tuple[int, ...] = (1, 4),
    frames: Literal["resampled", "published"] = "resampled",
    leave_out: Path | None = None,
    against: str = "base",
    set: Overrides = (),
) -> None:
    """Measure how much physics features hold: does a linear readout foresee contact (Physion)?

    The recipe's untouched base model, its teacher and straw men are read, and further models and
    teachers beside them. Trains nothing but the readout; goes on where it stopped.

    For example:
      videorepa probe recipes/videorepa-2b.yaml --data physion_mp4s --out probes/2b
      videorepa probe recipes/videorepa-2b.yaml --data physion_mp4s --out p --models runs/aligned
      videorepa probe src/videorepa/lab/demo.yaml --data build/contact --protocol lab --out p

    Args:
      data: Folder with Physion's `train` and `test`, or what `videorepa lab contact` drew.
      out: Folder of the tables (probe.json, accuracies.csv, differences.csv, predictions.csv).
      protocol: The release, and how its authors read features out; `lab` for the lab's own clips.
      models: Runs, recipes or diffusers folders, called by the names of their folders or files.
      teacher: NAME=WEIGHTS or NAME=WEIGHTS,KEY=VALUE of one more teacher. Can be given many times.
      blocks: Which blocks, counted from 1; by default those that the recipe aligns.
      timesteps: Of the noise that models are given.
      draws: Noises that each clip is read with.
      steps: Steps in time that are read, evenly spaced.
      pools: Rows and columns that each step is averaged to; each is a readout of its own.
      frames: Evenly from all that is shown, or only those that published extractors are given.
      leave_out: A text file with the name of a test clip a line, such as the buggy ones.
      against: The source that others are compared with.
    """
    from videorepa.probe import named, probe, read_names, table
    from videorepa.recipe import Recipe
    from videorepa.scan import teachers_from

    parsed = Recipe.from_yaml(recipe, set)
    found = probe(
        parsed,
        data,
        out,
        protocol=protocol,
        models=named(models),
        teachers=teachers_from(teacher, parsed),
        blocks=blocks or None,
        timesteps=timesteps,
        draws=draws,
        steps=steps,
        pools=pools,
        frames=frames,
        leave_out=read_names(leave_out) if leave_out else (),
        against=against,
    )
    print(table(found))
    print(f"probe: {out}")


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
    from videorepa.data.files import short_name
    from videorepa.report import report
    from videorepa.report.inputs import score_folders

    folders = {short_name(folder): folder for folder in clips}
    if len(folders) < len(clips):
        folders = {str(folder): folder for folder in clips}
    scores = {name: score_folders(folder) for name, folder in folders.items()}
    page = report(runs, out, generations=folders, scores=scores, scans=scan, probes=probe)
    print(f"report: {page}")


def compare(
    runs: Positional[tuple[Path, ...]], reference: Path | None = None, make: Path | None = None
) -> None:
    """Say whether a training's curves are normal: inside what other seeds of its recipe give.

    The exit code is 0 if they are and 1 if not. References of the demo's two runs are shipped.

    For example:
      videorepa compare demo/runs/aligned
      videorepa compare runs/seed-0 runs/seed-1 runs/seed-2 --make normal.json
      videorepa compare runs/seed-3 --reference normal.json

    Args:
      runs: Folders that `train` wrote.
      reference: A file that --make wrote; by default the shipped one of the run's recipe.
      make: Write the runs' bands to this file instead, from three runs or more.
    """
    from videorepa.compare import compare, make_reference

    if not runs:
        raise UserError("compare needs at least one run: a folder that `videorepa train` wrote.")
    if make is not None:
        found = make_reference(runs, make)
        print(f"reference of {len(found.seeds)} runs: {make}")
        return
    outside = []
    for run in runs:
        comparison = compare(run, reference)
        print(comparison)
        if comparison.is_normal:
            print(comparison.sentence)
        else:
            outside.append(comparison.sentence)
    if outside:
        raise UserError("\n".join(outside))


def demo(out: Path = Path("demo"), quick: bool = False) -> None:
    """Run everything on the lab's micro model: prepare, train, generate, evaluate, export, report.

    For example:
      videorepa demo
      videorepa demo --quick --out quick-demo

    Args:
      out: Folder that everything is left in; run again, it goes on where it stopped.
      quick: A few steps of each, to see that it works.
    """
    from videorepa.demo import demo

    page = demo(out, quick=quick)
    print(f"report: {page.resolve()}")


def lab(
    part: Positional[
        Literal[
            "study",
            "text-encoder",
            "autoencoder",
            "teacher",
            "image-teacher",
            "assemble",
            "ship",
            "laws",
            "phyworld",
            "contact",
        ]
    ],
    recipe: Annotated[Path | None, tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE")] = None,
    out: Path = Path("study"),
    rows: Path | None = None,
    shard: Shard = "0/1",
    set: Overrides = (),
) -> None:
    """Ask the lab's question, or make a part of its micro models from a recipe in recipes/micro.

    `phyworld` draws clips of PhyWorld's tasks, for models that continue clips; `contact` draws what
    `videorepa probe --protocol lab` asks about.

    `study` trains, generates and scores every arm of a study with every seed, and prints its
    tables; it goes on where it stopped, and several processes can share it. The other options are
    for it alone.

    For example:
      videorepa lab study --out study
      videorepa lab study --out study --shard 0/2
      videorepa lab study --rows study/rows.csv
      videorepa lab autoencoder recipes/micro/autoencoder.yaml
      videorepa lab phyworld recipes/micro/phyworld.yaml

    Args:
      recipe: A YAML file; of a study by default the short one that is shipped.
      out: Folder of the study.
      rows: Print the tables of these scores, which a study wrote, and train nothing.
    """
    if part == "study":
        from videorepa.lab.study import cost, study
        from videorepa.lab.study_recipe import SHORT, StudyRecipe
        from videorepa.lab.study_tables import read_rows, tables

        parsed = StudyRecipe.from_yaml(recipe or SHORT, set)
        if rows is not None:
            print(tables(parsed, read_rows(rows)))
            return
        found = study(parsed, out, shard=_shard(shard))
        print(f"{found.tables}\n{cost(found.recipe, found.out)}")
        for job in found.missing:
            print(f"still to be done: {job}")
        return
    from videorepa.lab.make import make

    if recipe is None:
        raise UserError(f"lab {part} needs a recipe, such as recipes/micro/{part}.yaml.")
    for key, value in make(part, recipe).items():
        print(f"{key}: {value:.4g}")


VERBS = {
    verb.__name__.removesuffix("_"): verb  # `import` cannot name a function.
    for verb in (
        *(prepare, head, train, refine, generate, evaluate, export, import_),
        *(inspect, scan, probe, compare, report, demo, lab),
    )
}


def main(arguments: list[str] | None = None) -> int:
    """Run a verb; the exit code is 0 if all went well, 1 for an error that the user can mend."""
    given = sys.argv[1:] if arguments is None else arguments
    if given in (["--version"], ["-V"]):
        from videorepa import __version__

        print(__version__)
        return 0
    try:
        tyro.extras.subcommand_cli_from_dict(
            VERBS,
            prog="videorepa",
            description=(__import__("videorepa").__doc__ or "").splitlines()[0],
            args=_with_overrides(given),
            config=(tyro.conf.OmitArgPrefixes, tyro.conf.HelptextFromCommentsOff),
        )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from here.", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno is None:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}. {_advice(error.errno)}", file=sys.stderr)
        return 1
    return 0


def _with_overrides(arguments: list[str]) -> list[str]:
    """Dotted options, which are keys of the recipe, spelled as `--set key=value`."""
    spelled: list[str] = []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            value = value if equals else next(waiting, None)
            if value is None or (not equals and value.startswith("--")):
                raise UserError(f"{name} wants a value: {name} VALUE, or {name}=VALUE.")
            spelled += ["--set", f"{name[2:].replace('-', '_')}={value}"]
        else:
            spelled.append(argument)
    return spelled


def _advice(number: int) -> str:
    """What to do about an error of the operating system."""
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "Make room and run the same command again; it goes on where it stopped."
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "Check who owns it and who may read and write it, or choose another place."
    return "Check the path, or choose another."


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UserError(f"--shard is I/N, such as 0/4; got {text!r}.")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
