"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import tyro

from videorepa.errors import UserError
from videorepa.system.wording import count

# Heavy libraries are imported inside the verbs, so that --help answers at once. In a verb's
# docstring, tyro leaves a section "Examples:" out of the help, and breaks a paragraph before each
# line that does not begin with a letter.
Positional = tyro.conf.Positional

Repeatable = tyro.conf.UseAppendAction[tuple[str, ...]]

RecipeFile = Positional[Annotated[Path, tyro.conf.arg(metavar="RECIPE", help="A YAML file.")]]

_SHARD = tyro.conf.arg(metavar="I/N", help="Do only the I-th of N parts, counted from 0.")

Shard = Annotated[str, _SHARD]

OptionalShard = Annotated[str | None, _SHARD]

Overrides = Annotated[
    Repeatable,
    tyro.conf.arg(
        metavar="KEY=VALUE",
        help="Change a key of the recipe: `--set seed=1`. A key with a dot can also be an option "
        "of its own: `--align.weight 0.45`.",
    ),
]

Settings = Annotated[
    Repeatable,
    tyro.conf.arg(
        metavar="KEY=VALUE",
        help="Set a key of the benchmark, such as `--set captions=videophy.csv`.",
    ),
]

Teachers = Annotated[
    Repeatable,
    tyro.conf.arg(
        metavar="NAME=WEIGHTS[,KEY=VALUE...]",
        help="One more teacher, such as `videomae=other.pth`, with keys of its encoder.",
    ),
]


def parse_shard(text: str) -> tuple[int, int]:
    """Parse "I/N". Raises UserError."""
    index, slash, number = text.partition("/")
    if not (slash and index.isdecimal() and number.isdecimal()):
        raise UserError(f"--shard is I/N, such as 0/4; got {text!r}.")
    return int(index), int(number)


def refuse(failures: Mapping[str, str], noun: str, message: str) -> None:
    """Raise UserError with the reason of each failure by its name, if there are any."""
    if failures:
        reasons = "".join(f"\n  {name!r}: {reason}" for name, reason in failures.items())
        raise UserError(f"{count(len(failures), noun)} {message}{reasons}")
