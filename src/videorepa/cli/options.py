"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

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


def parse_shard(text: str) -> tuple[int, int]:
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal()):
        raise UserError(f"--shard is I/N, such as 0/4; got {text!r}.")
    return int(index), int(count)
