"""Remembers the digests of clips, so that only files that were written to are read again."""

from __future__ import annotations

import json
import time
from pathlib import Path

from videorepa.data.source import ClipSource
from videorepa.system.files import atomic_write, parse_json
from videorepa.system.lock import lock_beside, locked


class Digests:
    """The digests of a source's clips, with the sizes and times that their files had.

    What is remembered only saves time: a file that is damaged costs digesting the clips again.
    Several processes can write into one file.

    Args:
      source: The clips.
      path: The file to remember them in.
    """

    def __init__(self, source: ClipSource, path: Path) -> None:
        self.source, self.path = source, path
        self.known = self._read()
        self.new: dict[str, list[int | str]] = {}
        self.kept = time.monotonic()

    def _read(self) -> dict[str, list[int | str]]:
        try:
            known = parse_json(self.path.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    def of(self, number: int) -> str:
        """Give the digest of the clip with this number in the source. Raises ClipError."""
        stamp = self.source.stamp(number)
        if stamp is None:
            return self.source.digest(number)
        name = self.source.items[number].id
        match self.known.get(name):
            case [*before, str(digest)] if before == stamp:
                return digest
        digest = self.source.digest(number)
        self.new[name] = [*stamp, digest]
        return digest

    def keep(self, every: float = 0.0) -> None:
        """Write down what is new, unless that was done less than so many seconds ago.

        Raises OSError.
        """
        if self.new and time.monotonic() - self.kept >= every:
            with locked(lock_beside(self.path), self.path, wait=True):
                self.known = self._read() | self.new
                atomic_write(self.path, json.dumps(self.known, sort_keys=True))
            self.new, self.kept = {}, time.monotonic()
