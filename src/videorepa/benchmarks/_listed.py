"""What benchmarks with a published list of captions share: finding a clip's caption in the list."""

from __future__ import annotations

from collections.abc import Collection
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

from videorepa.benchmarks import Benchmark
from videorepa.data.manifest import Prompt, read_prompts
from videorepa.errors import UserError
from videorepa.system.hub import local_copy


class Listed(Benchmark):
    """A benchmark whose prompts are a published list of captions.

    A clip may be generated from a caption or from a lengthened version of it; either way it is
    scored against the caption. A caption that several rows repeat counts once.

    Attributes:
        captions: The list: a .csv or .jsonl file with a column `caption`, a folder that holds one
            such file, or the id of a data set on the Hub.
        longer: Columns that may hold lengthened captions. The list may lack them.
    """

    captions: str
    longer: ClassVar[tuple[str, ...]]

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """The first `count` captions of the list, whatever the seed."""
        return list({prompt.id: prompt for prompt in self._by_text.values()}.values())[:count]

    def missing(self, prompts: Collection[str]) -> list[Prompt]:
        present = {p.id for text in prompts if (p := self._by_text.get(text.strip()))}
        return [p for p in self.prompts(len(self._by_text), 0) if p.id not in present]

    def about_prompt(self, prompt: str) -> dict[str, Any]:
        """Its entry "asked" is the list's caption, of which the prompt may be a longer version."""
        return super().about_prompt(prompt) | {"asked": self.find(prompt).caption}

    def find(self, text: str) -> Prompt:
        """The list's entry for the text that a clip was generated from.

        Raises:
            UserError: The text is neither a caption of the list nor a lengthened one.
        """
        prompt = self._by_text.get(text.strip())
        if prompt is None:
            columns = " or ".join(self.longer)
            longer = f", nor a lengthened one (column {columns})" if columns else ""
            raise UserError(
                f"The prompt {text[:80]!r} is no caption of {self.captions}{longer}; {self.name} "
                "scores only clips of its own captions."
            )
        return prompt

    @cached_property
    def _by_text(self) -> dict[str, Prompt]:
        """Entries by their caption and by their lengthened captions, in the list's order."""
        by_text: dict[str, Prompt] = {}
        for prompt in read_prompts(self._file, "caption"):
            first = by_text.setdefault(prompt.text.strip(), prompt)
            for column in self.longer:
                if isinstance(longer := prompt.row.get(column), str):
                    by_text.setdefault(longer.strip(), first)
        return by_text

    @property
    def _file(self) -> Path:
        path = local_copy(self.captions, "dataset")
        if path.is_file():
            return path
        lists = [file for file in path.rglob("*") if file.suffix in (".csv", ".jsonl")]
        if len(lists) != 1:
            names = ", ".join(sorted(file.name for file in lists)[:5]) or "none"
            raise UserError(
                f"Expected one list of captions, a .csv or .jsonl file, in {path}; found {names}. "
                "Name the file itself."
            )
        return lists[0]
