"""The lab's benchmark: captions of the lab's world, and its laws measured in the clips."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np

from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks import Benchmark
from videorepa.benchmarks.laws import checks as laws
from videorepa.data.manifest import Prompt
from videorepa.evaluation.pairs import Pairs, share
from videorepa.settings.bounds import Clips
from videorepa.world.scenarios import HELD_OUT_SEED, SCENARIOS, draw_scene

_APART = 1_000_000
"""How many scenes of a series lie between the first ones of two scenarios."""


class Lab(Benchmark):
    """Semantic adherence (sa), physical commonsense (pc) and both at once (joint), as measured.

    Attributes:
        prompts_made: How many captions `generate` takes by the benchmark's name.
    """

    name: Literal["lab"] = "lab"
    version: ClassVar[str] = laws.with_tolerances("2")
    prompts_made: Clips = 96

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """Captions of the scenarios in turn.

        A scenario repeats a caption only once it has used all of its captions. A shorter list is
        the beginning of a longer one.
        """
        names = list(SCENARIOS)
        series = {
            scenario: self._captions(scenario, HELD_OUT_SEED + 1 + seed, place * _APART)
            for place, scenario in enumerate(names)
        }
        prompts = []
        for number in range(count):
            scenario, turn = names[number % len(names)], number // len(names)
            prompts.append(Prompt(f"{scenario}-{seed}-{turn:04d}", next(series[scenario])))
        return prompts

    def every_prompt(self) -> list[Prompt]:
        return self.prompts(self.prompts_made, 0)

    def scenario(self, prompt: str) -> str | None:
        return laws.parse_caption(prompt).event

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        return dict.fromkeys(laws.FLAGS, "higher")

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, float | bool]:
        """Measure one clip.

        Args:
            frames: (F, 64, 64, 3) uint8.

        Returns:
            What `ClipVerdict.row` says.
        """
        return laws.score(frames, prompt).row()

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Flags as percentages with their intervals, and mean motion in pixels."""
        motion = float(np.mean([row["motion"] for row in rows])) if rows else float("nan")
        flags = {flag: share(rows, flag) for flag in laws.FLAGS}
        return flags | {"motion": {"mean": motion, "n": len(rows)}}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A in percentage points, paired by prompt and k. See `Pairs.compare`."""
        return Pairs.of(rows_a, rows_b).compare(laws.FLAGS)

    @staticmethod
    def _captions(scenario: str, seed: int, index: int) -> Iterator[str]:
        """The scenario's captions, without end. Each comes once before any is repeated.

        Args:
            scenario: The scenario.
            seed: The seed of the series to draw scenes from.
            index: The number of the first scene. Scenarios that drew the same scenes would share
                colours, and intervals take captions for independent.
        """
        used: set[str] = set()
        misses = 0
        while True:
            caption = draw_scene(seed, index, scenario).caption
            index += 1
            # After hundreds of repetitions, assume that the scenario has no other caption.
            misses = misses + 1 if caption in used else 0
            if misses > 300:
                used.clear()
                misses = 0
            if caption not in used:
                used.add(caption)
                yield caption
