"""PhyWorld (Kang et al. 2024, arXiv 2411.02385): laws inside and outside the training range.

It is for models that were trained on its tasks and continue clips. A model gets the first frames,
and what it generates after them is compared with the law.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks import Benchmark
from videorepa.benchmarks._phyworld import FRAMES, NAME, drawn, names, parsed, velocity_error
from videorepa.data.manifest import Prompt
from videorepa.data.video import read_all
from videorepa.errors import ClipError
from videorepa.evaluation.pairs import Pairs, mean

ERROR = "velocity_error"


class PhyWorld(Benchmark):
    """The error of velocity in world units per second, by task and by group of parameters.

    A prompt is the name of a motion, such as collision-v_out-0-0012, and its clip's file has the
    same name.

    Attributes:
        compat: Read positions as published, which makes every velocity too small. See
            `_phyworld.read`.
    """

    name: Literal["phyworld"] = "phyworld"
    version: ClassVar[str] = "1"
    compat: bool = False

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """Names of motions. Tasks and groups take turns."""
        return [Prompt(name, name) for name in names(count, seed)]

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        return {ERROR: "lower"}

    def about(self) -> dict[str, Any]:
        return {"compat": self.compat}

    def scenario(self, prompt: str) -> str:
        task, group, *_ = parsed(prompt)
        return f"{task} {group}"

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        """The videos that are named after a motion."""
        named = ((path, path.stem) for path in sorted(videos.glob("*.mp4")))
        return [
            (path, {"prompt_id": name, "caption": name, "k": 0})
            for path, name in named
            if NAME.fullmatch(name)
        ]

    def read(self, video: Path) -> np.ndarray:
        frames, _ = read_all(video)
        count, height, width, _ = frames.shape
        if count != FRAMES or height != width:
            raise ClipError(
                f"{video} has {count} frames of {width}x{height}; expected {FRAMES} square ones, "
                "with those that the model was given in front"
            )
        return frames

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Measure one clip's velocity_error, in world units per second.

        It is None for a ball that is too small to be measured well, which the published tables
        leave out too, and if the true ball is never wholly in view.
        """
        motion = drawn(prompt)
        if not motion.counts:
            return {ERROR: None, "invalid": {ERROR: "a ball too small to be measured well"}}
        error = velocity_error(frames, motion, compat=self.compat)
        if np.isnan(error):
            return {ERROR: None, "invalid": {ERROR: "no frame with the whole ball to compare"}}
        return {ERROR: error}

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        return {ERROR: mean(rows, ERROR)}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        return Pairs.of(rows_a, rows_b).compare((), (ERROR,))
