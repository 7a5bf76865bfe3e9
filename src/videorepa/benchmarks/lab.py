"""The lab's benchmark: captions of the micro world, scored by measuring its laws in the clip."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

import numpy as np

from videorepa.artifacts.scores import Row
from videorepa.benchmarks import Benchmark
from videorepa.benchmarks.laws import checks as laws
from videorepa.data.manifest import Prompt
from videorepa.evaluation.pairs import Pairs, share
from videorepa.world.scenarios import SCENARIOS, draw_scene

FLAGS = ("sa", "pc", "joint")


class Lab(Benchmark):
    """Semantic adherence (sa), physical commonsense (pc) and both at once (joint)."""

    name: Literal["lab"] = "lab"
    version: ClassVar[str] = "2"

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """`count` captions, the scenarios in turn. A scenario repeats a caption only when it has
        no other left. The first n of a longer list are the shorter list."""
        from videorepa.world.scenarios import HELD_OUT_SEED

        series = {
            scenario: self._captions(scenario, HELD_OUT_SEED + 1 + seed) for scenario in SCENARIOS
        }
        names = list(SCENARIOS)
        found = []
        for number in range(count):
            scenario, turn = names[number % len(names)], number // len(names)
            found.append(Prompt(f"{scenario}-{seed}-{turn:04d}", next(series[scenario])))
        return found

    def scenario(self, prompt: str) -> str | None:
        return laws.parse_caption(prompt).event

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, float | bool]:
        """Scores of one clip, frames (F, 64, 64, 3) uint8: sa, pc, joint; NAME_passed and
        NAME_value of every check that applies, in the unit of `laws.CHECKS`; and motion, the mean
        over the bodies of the length of the path, in pixels."""
        verdict = laws.score(frames, prompt)
        found: dict[str, float | bool] = {
            "sa": verdict.sa,
            "pc": verdict.pc,
            "joint": verdict.sa and verdict.pc,
            "motion": verdict.motion,
        }
        for name, check in verdict.checks.items():
            if check.applies:
                found[f"{name}_passed"] = check.passed
                found[f"{name}_value"] = check.value
        return found

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Shares in percent with Wilson intervals, and mean motion in pixels."""
        motion = float(np.mean([row["motion"] for row in rows])) if rows else float("nan")
        flags = {flag: share(rows, flag) for flag in FLAGS}
        return flags | {"motion": {"mean": motion, "n": len(rows)}}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A, in percentage points, paired by prompt and k: see `Pairs`."""
        return Pairs.of(rows_a, rows_b).compare(FLAGS)

    @staticmethod
    def _captions(scenario: str, seed: int) -> Iterator[str]:
        """The scenario's captions without end, each once before any comes again."""
        used: set[str] = set()
        index = misses = 0
        while True:
            caption = draw_scene(seed, index, scenario).caption
            index += 1
            # A few hundred draws in vain: the scenario has no other caption.
            misses = misses + 1 if caption in used else 0
            if misses > 300:
                used.clear()
                misses = 0
            if caption not in used:
                used.add(caption)
                yield caption
