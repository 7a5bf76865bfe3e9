"""What benchmarks with a published list of captions share: to find a clip's caption in it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

from videorepa.benchmarks import Benchmark, Prompt
from videorepa.data.manifest import read_prompts
from videorepa.errors import UserError
from videorepa.system.hub import local_copy


@dataclass(frozen=True)
class Item:
    """A caption of the list. row: what else its row holds, by column."""

    id: str
    caption: str
    row: Mapping[str, object]


class Listed(Benchmark):
    """captions: the published list, as a .csv or .jsonl file with a column `caption`, a folder with
    one such file, or a Hub data set's id. A caption that stands in several rows counts once.

    Clips are generated from a caption or from its lengthened version; they are scored against the
    caption. longer: columns of lengthened captions, of which the list may have any.
    """

    captions: str
    longer: ClassVar[tuple[str, ...]]

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """The first `count` captions of the list; it is the same for every seed."""
        unique = {item.id: Prompt(item.id, item.caption) for item in self._items.values()}
        return list(unique.values())[:count]

    def missing(self, prompts: Collection[str]) -> list[Prompt]:
        there = {self._items[text.strip()].id for text in prompts if text.strip() in self._items}
        return [prompt for prompt in self.prompts(len(self._items), 0) if prompt.id not in there]

    def item(self, prompt: str) -> Item:
        """What the list says of a clip's prompt. Raises UserError if it is not there."""
        found = self._items.get(prompt.strip())
        if found is None:
            raise UserError(
                f"The prompt {prompt[:80]!r} is no caption of {self.captions}, nor a lengthened "
                f"one (column {' or '.join(self.longer)}); {self.name} scores clips of its own "
                "captions alone."
            )
        return found

    @cached_property
    def _items(self) -> dict[str, Item]:
        """By caption and by lengthened caption, in the list's order."""
        found: dict[str, Item] = {}
        for prompt in read_prompts(self._file, "caption"):
            item = Item(prompt.id, prompt.text, prompt.row)
            item = found.setdefault(prompt.text.strip(), item)
            for column in self.longer:
                if isinstance(text := prompt.row.get(column), str):
                    found.setdefault(text.strip(), item)
        return found

    @property
    def _file(self) -> Path:
        path = local_copy(self.captions, "dataset")
        if path.is_file():
            return path
        lists = [file for file in path.rglob("*") if file.suffix in (".csv", ".jsonl")]
        if len(lists) != 1:
            named = ", ".join(sorted(file.name for file in lists)[:5]) or "none"
            raise UserError(
                f"Expected one list of captions, a .csv or .jsonl file, in {path}; found {named}. "
                "Name the file itself."
            )
        return lists[0]
