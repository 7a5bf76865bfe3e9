"""What a long measurement has finished: a file for each part, with what it was made from."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from videorepa.errors import UserError
from videorepa.system.files import atomic_write, is_vacant, sweep

T = TypeVar("T")


def claim_folder(out: Path, parts: str, what: str) -> None:
    """Make `out` the folder of a `what`, such as a scan: one with a folder `parts` in it.

    Raises UserError if it holds something else.
    """
    folder = out / parts
    if not folder.is_dir() and not is_vacant(out):
        raise UserError(f"{out} exists and is not a {what}. Choose another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)
    for place in (out, folder):
        sweep(place)


def read_finished(path: Path, made_with: dict[str, Any], parse: Callable[[Any], T]) -> T | None:
    """What was found, or None if that is still to be done. Raises UserError if the part was made
    from something else, or is damaged."""
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known = content["made_with"]
        differing = [key for key, value in made_with.items() if known.get(key) != value]
        found = parse(content["found"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Delete it; the same command measures it again."
        ) from None
    if differing:
        raise UserError(
            f"{path} was measured otherwise; it differs in {', '.join(differing)}. Choose another "
            "folder with --out, or delete this one."
        )
    return found


def write_finished(path: Path, made_with: dict[str, Any], found: Any) -> None:
    """Keep what was found, all at once. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"made_with": made_with, "found": found}, indent=1))
