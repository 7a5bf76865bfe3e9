"""Reads what a report is made from: folders of runs, clips, scores, scans and probes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from videorepa.errors import UserError

Parsed = TypeVar("Parsed", bound=BaseModel)


def parse(kind: type[Parsed], data: Any, where: str) -> Parsed:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the whole"
        raise UserError(
            f"{where}: {field}: {first['msg']}. It was not written by this version of videorepa, "
            "or was edited; write it again."
        ) from error


def json_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"{path} is missing. Expected a JSON object there; was the folder copied?")
    try:
        data = json.loads(path.read_bytes())
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}). Write it again.") from error
    if not isinstance(data, dict):
        raise UserError(f"{path} holds a {type(data).__name__}; expected a JSON object.")
    return data


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a JSON-lines file. An unreadable last line is left out, because a process
    that is killed while writing leaves one; anywhere else it means a damaged file."""
    lines = path.read_bytes().splitlines()
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
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
    for key, value in data.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_finished(folder: Path, verb: str, kind: type[Parsed]) -> Parsed:
    path = folder / f"{verb}.json"
    if not path.is_file():
        raise UserError(
            f"{folder} is not a finished {verb}: it holds no {path.name}. Run `videorepa {verb}`."
        )
    return parse(kind, json_object(path), str(path))
