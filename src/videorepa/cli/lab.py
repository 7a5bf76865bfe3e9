"""Commands of the lab and the demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from videorepa.cli.options import Overrides, Positional, Shard, parse_shard
from videorepa.errors import UserError


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
        from videorepa.lab.study.arms import cost, study
        from videorepa.lab.study.recipe import SHORT, StudyRecipe
        from videorepa.lab.study.tables import read_rows, tables

        parsed = StudyRecipe.from_yaml(recipe or SHORT, set)
        if rows is not None:
            print(tables(parsed, read_rows(rows)))
            return
        found = study(parsed, out, shard=parse_shard(shard))
        print(f"{found.tables}\n{cost(found.recipe, found.out)}")
        for job in found.missing:
            print(f"still to be done: {job}")
        return
    from videorepa.lab.models.make import make

    if recipe is None:
        raise UserError(f"lab {part} needs a recipe, such as recipes/micro/{part}.yaml.")
    for key, value in make(part, recipe).items():
        print(f"{key}: {value:.4g}")
