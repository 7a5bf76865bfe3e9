"""Commands that prepare and train a recipe, and that inspect a recipe or a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from videorepa.cli.options import Overrides, Positional, RecipeFile, Shard, parse_shard, refuse
from videorepa.errors import UserError
from videorepa.system.wording import count


def prepare(recipe: RecipeFile, shard: Shard = "0/1", set: Overrides = ()) -> None:
    """Turn videos and captions into a cache of latents, text embeddings and teacher features.

    A second call resumes where the first one stopped. A clip that cannot be used is reported, and
    the others are still prepared.

    For example:
      videorepa prepare recipes/videorepa-2b.yaml
      videorepa prepare recipes/videorepa-2b.yaml --shard 1/4
    """
    from videorepa.prepare import prepare
    from videorepa.recipe import Recipe

    done = prepare(Recipe.from_yaml(recipe, set), shard=parse_shard(shard))
    print(f"prepared {done.made}, complete before {done.complete}, failed {len(done.failed)}")
    refuse(
        done.failed,
        "clip",
        "cannot be used. Training leaves out what is listed here; fix it and run the same command "
        "again, or go on without it.",
    )


def head(
    recipe: RecipeFile,
    kind: Literal["motion", "saliency"],
    out: Path,
    clips: int = 200,
    set: Overrides = (),
) -> None:
    """Train a small head on the recipe's teacher: features of motion, or a saliency of each token.

    The head learns from the optical flow of the recipe's clips, and its error is measured on clips
    that are held out. The recipe's encoder is the plain teacher, or the `headed` one that will use
    this head. A call that was stopped starts over; one that was finished is not repeated.

    For example:
      videorepa head recipes/videorepa-2b.yaml --kind motion --out heads/motion.safetensors

    Args:
      kind: `motion` for the loss `moalign`, `saliency` for `sara`.
      out: The file to write; must not exist yet, unless it holds this very head.
      clips: Use at most this many clips.
    """
    from videorepa.head import train_head
    from videorepa.recipe import Recipe

    trained = train_head(Recipe.from_yaml(recipe, set), kind, out, clips=clips)
    print(trained)
    refuse(trained.failed, "clip", "could not be used; the head was trained on the others.")


def train(
    recipe: RecipeFile, out: Path | None = None, set: Overrides = (), profile: int = 0
) -> None:
    """Fine-tune with the recipe's alignment loss; the same command resumes a stopped run.

    With --align.weight 0 it trains the control: the same code without alignment.

    For example:
      videorepa train recipes/videorepa-2b.yaml
      videorepa train recipes/videorepa-2b.yaml --align.weight 0 --out runs/control

    Args:
      out: Folder of the run; by default runs/NAME, with the recipe's name.
      profile: How many steps after the first to profile with torch.profiler. The trace goes into
        the run's folder.
    """
    from videorepa.recipe import Recipe
    from videorepa.train import train

    parsed = Recipe.from_yaml(recipe, set)
    run = train(parsed, out or Path("runs") / parsed.name, profile=profile)
    print(f"trained: {run.path}")


def inspect(recipe: RecipeFile, set: Overrides = (), device: str | None = None) -> None:
    """Print shapes, parameters, disk space, peak memory and work of a recipe; load nothing.

    For example:
      videorepa inspect recipes/videorepa-2b.yaml --device cuda
      videorepa inspect recipes/videorepa-2b.yaml --data.frames 25 --encoder.frames 24

    Args:
      device: Predict memory for cpu or cuda, which this machine need not have.
    """
    from videorepa.inspect import inspect
    from videorepa.recipe import Recipe

    print(inspect(Recipe.from_yaml(recipe, set), device=device))


def verify(
    recipe: RecipeFile,
    out: Path | None = None,
    against: Path | None = None,
    judge: str | None = None,
    skip: tuple[
        Literal[
            "files", "step", "text", "autoencoder", "transformer", "teacher", "judge", "export"
        ],
        ...,
    ] = (),
    set: Overrides = (),
    device: str | None = None,
) -> None:
    """Check on your own weights that files are whole and that models do what stock classes do.

    A table says what was compared; a JSON file keeps it, with versions, digests and figures, small
    enough to be pasted into an issue. The exit code is 1 if a check fails. The recipe's clips are
    not read. Training steps on a CPU can take hours: leave them out with --skip step.

    For example:
      videorepa verify recipes/videorepa-2b.yaml
      videorepa verify recipes/videorepa-5b.yaml --skip step export --judge videophy=judge
      videorepa verify recipes/videorepa-2b.yaml --against verified.json

    Args:
      out: The JSON file; by default verified-NAME.json, with the recipe's name.
      against: An earlier file of the same weights, from here or elsewhere, to compare with.
      judge: Check the judge of this benchmark too, as NAME or NAME=FOLDER.
      skip: Parts to leave out.
      device: Where the models run: cpu or cuda.
    """
    from videorepa.recipe import Recipe
    from videorepa.verify import verify

    parsed = Recipe.from_yaml(recipe, set)
    path = out or Path(f"verified-{parsed.name}.json")
    record = verify(parsed, path, against=against, judge=judge, skip=skip, device=device)
    print(f"record: {path}")
    if record.failed:
        failing = "".join(f"\n  {check.name}: {check.words}" for check in record.failed)
        raise UserError(f"{count(len(record.failed), 'check')} failed.{failing}")


def compare(
    runs: Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="[RUN ...]")]],
    reference: Path | None = None,
    make: Path | None = None,
) -> None:
    """Say whether a run's curves lie within the range of other seeds of its recipe.

    The exit code is 0 if they do and 1 if not. References for the demo's two runs are shipped. (To
    compare two models' clips, use `evaluate --against`.)

    For example:
      videorepa compare demo/runs/aligned
      videorepa compare runs/seed-0 runs/seed-1 runs/seed-2 --make normal.json
      videorepa compare runs/seed-3 --reference normal.json

    Args:
      runs: Folders that `train` wrote.
      reference: A file that --make wrote; by default the shipped one for the run's recipe.
      make: Write a reference, made from three runs or more, to this file instead.
    """
    from videorepa.compare import compare, make_reference

    if not runs:
        raise UserError("compare needs at least one run: a folder that `videorepa train` wrote.")
    if make is not None:
        made = make_reference(runs, make)
        print(f"reference of {len(made.seeds)} runs: {make}")
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
