"""What VideoPhy and VideoPhy-2 share: mPLUG-Owl-Video as the judge, and its 32 frames of a clip."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np

from videorepa.benchmarks._judged import Judged
from videorepa.benchmarks.mplug_owl.judge import OwlJudge, digest, frame_indices
from videorepa.data.video import read_squashed
from videorepa.system.device import pick_device


class Videophysics(Judged):
    """Semantic adherence (sa), physical commonsense (pc) and both at once (joint)."""

    def read(self, video: Path) -> np.ndarray:
        """The 32 frames that the judge sees, squashed to its size: (32, side, side, 3) uint8."""
        frames = read_squashed(video, self.live.side, self.live.side)
        return frames[frame_indices(len(frames))]

    @cached_property
    def live(self) -> OwlJudge:
        """The judge, loaded on first use."""
        return OwlJudge.load(self._folder, pick_device(), self._dtype)

    @cached_property
    def _identity(self) -> dict[str, str]:
        return {
            "model": "mPLUG-Owl-Video",
            "weights": digest(self._folder),
            "frames": "32 of n, (n - 1) / 32 apart",
            "scaling": "squashed, bilinear, by FFmpeg",
        }
