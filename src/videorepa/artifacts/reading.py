"""Reads JSON files and says in a sentence what is wrong with a damaged one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from videorepa.errors import UserError
from videorepa.system.files import check_is_folder, parse_json, read_bytes

Record = TypeVar("Record", bound=BaseModel)


def read_record(kind: type[Record], path: Path) -> Record:
    """Read a JSON file into a model. Raises UserError if it is missing or does not fit."""
    try:
        return kind.model_validate(json_object(path))
    except ValidationError as error:
        raise UserError(
            f"{path}: {first_fault(error)}. Another version of videorepa wrote it, or it was "
            "edited; write it again."
        ) from error


def first_fault(error: ValidationError) -> str:
    """Describe the first field that does not fit, and why."""
    first = error.errors()[0]
    return f"{'.'.join(map(str, first['loc'])) or 'the whole'}: {first['msg']}"


def json_object(path: Path) -> dict[str, Any]:
    """Read the JSON object in a file. Raises UserError if it is missing or holds none."""
    if not path.exists():
        raise UserError(f"{path} is missing. Expected a JSON object there; was the folder copied?")
    try:
        data = parse_json(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Write it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}; expected a JSON object.")
    return data


def json_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects in a JSON-lines file.

    An unreadable last line is left out, because a process that is killed while writing leaves one.

    Raises:
        UserError: Any other line is unreadable, or a line holds no JSON object.
    """
    lines = read_bytes(path).splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number} of {len(lines)} is not JSON ({error}). Only the last line "
                "may be cut off; delete this one, or restore the file."
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number} is {line[:40]!r}; expected a JSON object.")
        rows.append(row)
    return rows


def leaves(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Give the innermost values of nested mappings, with their dotted names."""
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_result(folder: Path, verb: str, kind: type[Record]) -> Record:
    """Read what a verb wrote when it was done. Raises UserError if it is missing or damaged."""
    check_is_folder(folder, f"what `videorepa {verb}` wrote")
    path = folder / f"{verb}.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished {verb}: it holds no {path.name}. Run `videorepa {verb}`."
        )
    return read_record(kind, path)
