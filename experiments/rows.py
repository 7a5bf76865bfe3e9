"""Rows that an experiment measures, one after another."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from videorepa.system.files import atomic_write, csv_text


def keep(rows: Iterable[dict[str, Any]], out: Path | None) -> None:
    """Print each row when it is there, and write all as CSV if a file is given."""
    found = []
    for row in rows:
        print(row, flush=True)
        found.append(row)
    if out:
        atomic_write(out, csv_text(list(found[0]), found))
