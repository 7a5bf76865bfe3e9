"""The command line: every verb with its arguments, examples and plain errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from videorepa.errors import UserError

# Heavy libraries are imported inside the verbs: --help has to answer at once.
Positional = tyro.conf.Positional
Shard = Annotated[str, tyro.conf.arg(metavar="I/N", help="Do the I-th of N parts, from 0.")]
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="KEY=VALUE")]


def prepare(recipe: Positional[Path], shard: Shard = "0/1", set: Overrides = ()) -> None:
    """Turn videos and captions into a cache of latents, text embeddings and teacher features.

    Goes on where it stopped. A clip that cannot be used is reported and costs that clip alone.
    Any key of the recipe can be changed on the command line: --train.precision float32.

    Examples:
      videorepa prepare recipes/videorepa-2b.yaml
      videorepa prepare recipes/videorepa-2b.yaml --shard 1/4
    """
    from videorepa.prepare import prepare
    from videorepa.recipe import Recipe

    done = prepare(Recipe.from_yaml(recipe, set), shard=_shard(shard))
    print(f"prepared {done.made}, found {done.found} done before, failed {len(done.failed)}")
    for name, reason in done.failed.items():
        print(f"  {name!r}: {reason}")
    if done.failed:
        raise UserError(f"{len(done.failed)} clips cannot be used; training goes without them.")


def train(recipe: Positional[Path], out: Path | None = None, set: Overrides = ()) -> None:
    """Fine-tune with the recipe's alignment loss; the same command resumes exactly.

    The run is left in --out, by default runs/NAME. `--align.weight 0` is the control.

    Examples:
      videorepa train recipes/videorepa-2b.yaml
      videorepa train recipes/videorepa-2b.yaml --align.weight 0 --out runs/control
    """
    from videorepa.recipe import Recipe
    from videorepa.train import train

    parsed = Recipe.from_yaml(recipe, set)
    run = train(parsed, out or Path("runs") / parsed.name)
    print(f"trained: {run.path}")


def generate(
    model: Positional[Path],
    prompts: Path,
    out: Path,
    samples: int | None = None,
    steps: int | None = None,
    guidance_scale: float | None = None,
    backbone: str = "cogvideox",
    shard: Shard = "0/1",
) -> None:
    """Generate an mp4 file with a JSON sidecar for every prompt.

    MODEL is a run, a recipe (its untouched base model), a diffusers folder, or `micro`. Prompts are
    a .txt, .csv or .jsonl file. Seeds depend on the prompt and the sample's number alone, so that
    two models can be compared clip by clip. Goes on where it stopped.

    Examples:
      videorepa generate runs/videorepa-2b --prompts prompts.txt --out clips/aligned
      videorepa generate recipes/videorepa-2b.yaml --prompts prompts.txt --out clips/base
    """
    from videorepa.data.manifest import read_prompts
    from videorepa.generate import default_settings, generate

    given = {"samples": samples, "steps": steps, "guidance_scale": guidance_scale}
    changed = {key: value for key, value in given.items() if value is not None}
    settings = default_settings(model, backbone).model_copy(update=changed)
    clips = generate(
        model,
        read_prompts(prompts),
        out,
        settings=type(settings).model_validate(settings.model_dump()),
        backbone=backbone,
        shard=_shard(shard),
    )
    print(f"{len(clips)} clips in {out}")


def evaluate(
    benchmark: Positional[str],
    videos: Positional[Path],
    out: Path | None = None,
    against: Path | None = None,
) -> None:
    """Score a folder of generated clips; print a table with 95 % intervals.

    With --against, another folder of clips of the same prompts and seeds is compared pair by pair.

    Examples:
      videorepa evaluate lab clips/aligned
      videorepa evaluate lab clips/aligned --against clips/control
    """
    from videorepa.evaluate import evaluate, table

    found = evaluate(benchmark, videos, out, against=against)
    print(table({videos.name: found}))
    print(f"scores: {found.out}")
    failures = found.summary["failures"]
    for failure in failures:
        print(f"  {failure['prompt_id']!r} {failure['k']}: {failure['reason']}")
    if failures:
        raise UserError(f"{len(failures)} clips could not be scored; the table is of the others.")


def export(
    run: Positional[Path],
    out: Positional[Path],
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write what a run has trained as a folder (or LoRA file) that plain diffusers loads.

    The result is reloaded by stock diffusers in a process of its own and its output compared.

    Examples:
      videorepa export runs/videorepa-2b exported
    """
    import torch

    from videorepa.export import export

    print(f"exported and checked: {export(run, out, dtype=getattr(torch, dtype))}")


def inspect(recipe: Positional[Path], set: Overrides = ()) -> None:
    """Print shapes, parameters and disk space of a recipe; loads and writes nothing.

    Examples:
      videorepa inspect recipes/videorepa-2b.yaml
      videorepa inspect recipes/videorepa-2b.yaml --data.frames 25 --encoder.frames 24
    """
    from videorepa.inspect import inspect
    from videorepa.recipe import Recipe

    print(inspect(Recipe.from_yaml(recipe, set)))


def report(
    runs: Positional[tuple[Path, ...]],
    out: Path = Path("report.html"),
    clips: tuple[Path, ...] = (),
) -> None:
    """Write one self-contained HTML page: curves, table, clips side by side.

    --clips are folders that `generate` wrote; if `evaluate` has scored them, the scores are shown.

    Examples:
      videorepa report runs/aligned runs/control --clips clips/base clips/control clips/aligned
    """
    from videorepa.report import report

    scores = {c.name: c / "scores" for c in clips if (c / "scores" / "summary.json").exists()}
    page = report(runs, out, generations={c.name: c for c in clips}, scores=scores)
    print(f"report: {page}")


def demo(out: Path = Path("demo"), quick: bool = False) -> None:
    """Run everything on the lab's micro model: prepare, train, generate, evaluate, export, report.

    --quick does a few steps of each, to see that it works.

    Examples:
      videorepa demo
    """
    from videorepa.demo import demo

    page = demo(out, quick=quick)
    print(f"report: {page.resolve()}")


def lab(
    part: Positional[Literal["text-encoder", "autoencoder", "teacher", "assemble", "laws"]],
    recipe: Positional[Path],
) -> None:
    """Make a part of the lab's own micro models, from a recipe in recipes/micro.

    Examples:
      videorepa lab autoencoder recipes/micro/autoencoder.yaml
    """
    from videorepa.lab.make import make

    for key, value in make(part, recipe).items():
        print(f"{key}: {value:.4g}")


VERBS = {
    verb.__name__: verb
    for verb in (prepare, train, generate, evaluate, export, inspect, report, demo, lab)
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
        if error.errno not in (28, 122, 13, 30):
            raise
        print(f"error: {error.strerror}: {error.filename or ''}".rstrip(": "), file=sys.stderr)
        return 1
    return 0


def _with_overrides(arguments: list[str]) -> list[str]:
    """Dotted options, which are keys of the recipe, as one `--set key=value ...` at the end."""
    rest, changes = [], []
    waiting = iter(arguments)
    for argument in waiting:
        name, equals, value = argument.partition("=")
        if name.startswith("--") and "." in name:
            value = value if equals else next(waiting, None)
            if value is None:
                raise UserError(f"{name} wants a value.")
            changes.append(f"{name[2:].replace('-', '_')}={value}")
        else:
            rest.append(argument)
    return [*rest, "--set", *changes] if changes else rest


def _shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdigit() and count.isdigit()):
        raise UserError(f"--shard is I/N, such as 0/4; got {text!r}.")
    return int(index), int(count)


if __name__ == "__main__":
    sys.exit(main())
