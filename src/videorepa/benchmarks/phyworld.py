"""PhyWorld (Kang et al. 2024, arXiv 2411.02385): does a model follow a law within the range that it
was trained on, and beyond?

It is for models that continue clips, trained on these tasks: the first frames are given, and the
rest is compared with the law.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from videorepa.artifacts.scores import Row
from videorepa.benchmarks import Benchmark
from videorepa.benchmarks._phyworld import FRAMES, NAME, drawn, names, parsed, velocity_error
from videorepa.data.manifest import Prompt
from videorepa.data.video import read_all
from videorepa.errors import ClipError
from videorepa.evaluation.pairs import Pairs, mean

ERROR = "velocity_error"


class PhyWorld(Benchmark):
    """The error of velocity, in world units a second, by task and by what is beyond the range.

    A prompt is the name of a motion, such as collision-v_out-0-0012, and so is the name of its
    clip's file.

    compat: read positions as published, with every velocity too small by a pixel in the width.
    """

    name: Literal["phyworld"] = "phyworld"
    version: ClassVar[str] = "1"
    compat: bool = False

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """Names of motions, the tasks and groups in turn."""
        return [Prompt(name, name) for name in names(count, seed)]

    def about(self) -> dict[str, Any]:
        return {"compat": self.compat}

    def scenario(self, prompt: str) -> str:
        task, group, *_ = parsed(prompt)
        return f"{task} {group}"

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        """Those called by a motion's name."""
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
        """velocity_error; None where the published tables leave the clip out, because its ball is
        too small to be read well, and where no frame shows the true ball."""
        motion = drawn(prompt)
        if not motion.counts:
            return {ERROR: None, "invalid": {ERROR: "a ball too small to be read well"}}
        error = velocity_error(frames, motion, compat=self.compat)
        if np.isnan(error):
            return {ERROR: None, "invalid": {ERROR: "no frame with the whole ball to compare"}}
        return {ERROR: error}

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        return {ERROR: mean(rows, ERROR)}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        return Pairs.of(rows_a, rows_b).compare((), (ERROR,))
