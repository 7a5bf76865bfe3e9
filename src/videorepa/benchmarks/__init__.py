"""Benchmarks: what to generate, how to score a clip, and how scores become a table.

A benchmark is a module of this package with a description: a class with a literal `name` that
derives from `Benchmark` below, and has the benchmark's settings as its fields.
A row is what scoring one clip gave, with where it came from: a dict with "prompt_id", "k" (the
number of the sample for that prompt), "scenario" (or None) and all keys of the clip's score.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from videorepa.artifacts.scores import Row
from videorepa.data.manifest import Prompt
from videorepa.settings.section import Section


class Benchmark(Section):
    """The contract. Cheap to make: what is heavy is loaded when the first clip is scored.

    version changes whenever the same clip could get another score. A prompt, below, is what a
    clip is scored against; it may have been generated from a detailed version.
    """

    name: str
    version: ClassVar[str]

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        raise NotImplementedError

    def about(self) -> dict[str, Any]:
        """What else a score depends on, such as a judge's weights. It stands in every row, and
        rows in which it differs are scored anew."""
        return {}

    def scenario(self, prompt: str) -> str | None:
        """The part of the benchmark that the prompt belongs to, which gets a table of its own."""
        return None

    def missing(self, prompts: Collection[str]) -> list[Prompt]:
        """The benchmark's own prompts that are not among these; none where its list is open."""
        return []

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        """Clips of a folder that is laid out as the benchmark's authors want it, each with its
        "prompt_id", "caption" and "k"; none where it is one that `generate` wrote."""
        return []

    def read(self, video: Path) -> np.ndarray:
        """The frames (F, H, W, 3) uint8 that `score` wants. Raises ClipError."""
        from videorepa.data.video import read_all

        return read_all(video)[0]

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """All that is to stand in the clip's row. A metric whose value could not be told is None,
        and "invalid" says why, by metric. Raises UserError for a prompt that is not the
        benchmark's."""
        raise NotImplementedError

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Name of a metric -> {"percent" or "mean": its value, and what more is known of it, such
        as "low", "high" and "n"}. It is asked for all rows, and for each scenario's."""
        raise NotImplementedError

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """Name of a metric -> {"difference": B minus A, "low", "high", "p", ...}, and "unpaired",
        the number of rows left out."""
        raise NotImplementedError
