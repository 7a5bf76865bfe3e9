"""The commands `lab` and `demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from videorepa.cli.options import OptionalShard, Overrides, Positional, parse_shard
from videorepa.errors import UserError
from videorepa.system.wording import listed


def demo(out: Path = Path("demo"), quick: bool = False) -> None:
    """Run every stage on the lab's micro model, from prepare and train to export and report.

    A second call resumes where the first one stopped.

    For example:
      videorepa demo
      videorepa demo --quick --out quick-demo

    Args:
      out: Folder of all results.
      quick: Do only a few steps of each stage, to see that everything works.
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
            "pairs",
        ]
    ],
    recipe: Positional[Annotated[Path | None, tyro.conf.arg(metavar="[RECIPE]")]] = None,
    out: Path | None = None,
    rows: Path | None = None,
    shard: OptionalShard = None,
    set: Overrides = (),
) -> None:
    """Run the lab's study, or make a part of its micro models from a recipe in recipes/micro.

    A `study` trains every arm with every seed, measures each model, generates and scores its clips
    as the recipe asks, and prints the tables. A second call resumes where the first one stopped,
    and several processes can share the work. The options --out, --rows, --shard and --set are for
    it alone.

    The parts `phyworld`, `contact` and `pairs` draw clips: of PhyWorld's tasks, for models that
    continue clips; of two objects that touch or not, for `videorepa probe --protocol lab`; and each
    clip beside a copy that breaks one law, for `videorepa likelihood`.

    For example:
      videorepa lab study --out study
      videorepa lab study --out study --shard 0/2
      videorepa lab study --rows study/rows.csv
      videorepa lab autoencoder recipes/micro/autoencoder.yaml
      videorepa lab phyworld recipes/micro/phyworld.yaml

    Args:
      part: What to make.
      recipe: A YAML file; every part but `study` needs one. A study's default is the short one that
        is shipped.
      out: Folder of the study; by default `study`.
      rows: Train nothing, and print the tables of this file, rows.csv or measured.csv, which a
        study wrote.
    """
    if part == "study":
        from videorepa.lab.study.arms import cost, study
        from videorepa.lab.study.recipe import SHORT, StudyRecipe
        from videorepa.lab.study.tables import tables_of

        parsed = StudyRecipe.from_yaml(recipe or SHORT, set)
        if rows is not None:
            print(tables_of(parsed, rows))
            return
        result = study(parsed, out or Path("study"), shard=parse_shard(shard or "0/1"))
        print(f"{result.tables}\n{cost(result.recipe, result.out)}")
        for job in result.missing:
            print(f"still to be done: {job}")
        return
    from videorepa.lab.models.make import make

    if recipe is None:
        raise UserError(f"lab {part} needs a recipe, such as recipes/micro/{part}.yaml.")
    of_study = {"--out": out, "--rows": rows, "--shard": shard, "--set": set or None}
    if given := [option for option, value in of_study.items() if value is not None]:
        raise UserError(
            f"Leave out {listed(given)}, for `lab study` alone. lab {part} takes all from its "
            f"recipe: change a copy of {recipe}."
        )
    for key, value in make(part, recipe).items():
        print(f"{key}: {value:.4g}")
