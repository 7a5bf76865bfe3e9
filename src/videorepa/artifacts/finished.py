"""Keeps the finished parts of a long measurement, each in a file that says how it was made."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from videorepa.errors import UserError
from videorepa.system.files import atomic_write, is_vacant, parse_json, read_text

T = TypeVar("T")


def claim_folder(out: Path, parts: str, what: str) -> None:
    """Make `out` the folder of a measurement.

    Args:
        out: The folder; it need not exist.
        parts: The name of the folder in it that holds the finished parts.
        what: The measurement's name in messages, such as "scan".

    Raises:
        UserError: `out` holds something else.
    """
    folder = out / parts
    if not folder.is_dir() and not is_vacant(out):
        raise UserError(f"{out} exists and is not a {what}. Choose another folder with --out.")
    folder.mkdir(parents=True, exist_ok=True)


def read_finished(path: Path, made_with: dict[str, Any], parse: Callable[[Any], T]) -> T | None:
    """Read a finished part.

    Args:
        path: The part's file.
        made_with: What the part depends on.
        parse: Makes the result from the JSON value that `write_finished` wrote.

    Returns:
        The result, or None if the part is still to be done.

    Raises:
        UserError: The part was made with something else, or is damaged.
    """
    if not path.exists():
        return None
    try:
        content = parse_json(read_text(path))
        before = content["made_with"]
        differing = [key for key, value in made_with.items() if before.get(key) != value]
        result = parse(content["result"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}). Delete it; the same command measures it again."
        ) from None
    if differing:
        raise UserError(
            f"{path} was measured otherwise; it differs in {', '.join(differing)}. Choose another "
            "folder with --out, or delete this one."
        )
    return result


def write_finished(path: Path, made_with: dict[str, Any], result: Any) -> None:
    """Write a finished part, whole or not at all. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"made_with": made_with, "result": result}, indent=1))
