"""PhyWorld (Kang et al. 2024, arXiv 2411.02385): laws inside and outside the training range.

It is for models that were trained on its tasks and continue clips. A model gets the first frames,
and what it generates after them is compared with the law.

The authors' models get three frames. Models here get whole latents, of which the first is frame 0
and the second covers frames 1 to 4, or 1 to 8: of three frames they would see frame 0 alone, and no
velocity. So `generate` shows two latents, five or nine frames, and what was shown is not scored.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np

from videorepa.artifacts.clips import Sidecar
from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks import Benchmark, ClipForm
from videorepa.benchmarks._phyworld import (
    FRAMES,
    NAME,
    SHOWN,
    Group,
    Task,
    drawn,
    names,
    parsed,
    render,
    velocity_error,
)
from videorepa.data.manifest import Prompt
from videorepa.data.video import read_all
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.pairs import Pairs, mean
from videorepa.settings.bounds import Number, Seed

ERROR = "velocity_error"


class ContinuedMotion(NamedTuple):
    """A clip, and how many of its first frames the model was shown."""

    clip: np.ndarray
    shown: int = SHOWN


def _shown(video: Path) -> int:
    """How many frames `generate` showed, as the sidecar says; the published number without one."""
    sidecar = video.with_suffix(".json")
    if not sidecar.is_file():
        return SHOWN
    shown = (Sidecar.read(sidecar).model_extra or {}).get("shown_frames", SHOWN)
    if not (isinstance(shown, int) and SHOWN <= shown < FRAMES - 2):
        raise ClipError(f"{sidecar} says that {shown!r} frames were shown; expected 3 to 29")
    return shown


def _tested(name: str) -> tuple[Task, Group]:
    """Task and group of a motion. Raises UserError unless it is one for evaluation."""
    split, task, group, *_ = parsed(name)
    if split != "test":
        raise UserError(
            f"{name} is a motion to train on, and models are scored on others. Take clips of names "
            'with "test" in front: `generate --prompts phyworld`, or split: test to draw them.'
        )
    return task, group


class PhyWorld(Benchmark):
    """The error of velocity in world units per second, by task and by group of parameters.

    A prompt is the name of a motion, such as test-collision-v_out-0-0012, and its clip's file has
    the same name. Motions to train on are refused.

    Attributes:
        compat: Read positions as published, which makes every velocity too small. See
            `_phyworld.read`.
        motions: How many motions `generate` continues.
        seed: Chooses among series of them.
    """

    name: Literal["phyworld"] = "phyworld"
    version: ClassVar[str] = "3"
    compat: bool = False
    motions: Number = 120
    seed: Seed = 0

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """Names of motions. Tasks and groups take turns."""
        return [Prompt(name, name) for name in names("test", count, seed)]

    def every_prompt(self) -> list[Prompt]:
        return self.prompts(self.motions, self.seed)

    def form(self, fps: float) -> ClipForm:
        """All frames at the clips' own rate, which is not the world's."""
        return ClipForm(frames=FRAMES, samples=1, shown=SHOWN)

    def opening(self, prompt: str, frames: int, height: int, width: int) -> np.ndarray:
        if height != width:
            raise UserError(
                f"PhyWorld's world is square, and clips have {height}x{width} pixels. Set "
                "data.height and data.width to one number, at which the model was trained."
            )
        return render(drawn(prompt), height, frames)

    def filmed(self, prompt: str, frames: int, height: int, width: int) -> np.ndarray:
        """The motion by the law."""
        return self.opening(prompt, frames, height, width)

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        return {ERROR: "lower"}

    def about(self) -> dict[str, Any]:
        return {"compat": self.compat}

    def scenario(self, prompt: str) -> str:
        task, group = _tested(prompt)
        return f"{task} {group}"

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        """The videos that are named after a motion."""
        named = ((path, path.stem) for path in sorted(videos.glob("*.mp4")))
        return [
            (path, {"prompt_id": name, "caption": name, "k": 0})
            for path, name in named
            if NAME.fullmatch(name) and _tested(name)
        ]

    def read(self, video: Path) -> ContinuedMotion:
        frames, _ = read_all(video)
        count, height, width, _ = frames.shape
        if count != FRAMES or height != width:
            raise ClipError(
                f"{video} has {count} frames of {width}x{height}; expected {FRAMES} square ones, "
                "with those that the model was given in front"
            )
        return ContinuedMotion(frames, _shown(video))

    def score(self, frames: ContinuedMotion, prompt: str) -> dict[str, Any]:
        """Measure one clip's velocity_error, in world units per second.

        It is None for a ball that is too small to be measured well, which the published tables
        leave out too, and if the true ball is never wholly in view. "shown" says how many frames
        the model was shown.
        """
        _tested(prompt)
        motion, told = drawn(prompt), {"shown": frames.shown}
        if not motion.counts:
            return told | {ERROR: None, "invalid": {ERROR: "a ball too small to be measured well"}}
        error = velocity_error(frames.clip, motion, compat=self.compat, shown=frames.shown)
        if np.isnan(error):
            reason = "no frame with the whole ball to compare"
            return told | {ERROR: None, "invalid": {ERROR: reason}}
        return told | {ERROR: error}

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        return {ERROR: mean(rows, ERROR)}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        return Pairs.of(rows_a, rows_b).compare((), (ERROR,))
