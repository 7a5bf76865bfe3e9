"""What VideoPhy and VideoPhy-2 share: mPLUG-Owl-Video as the judge, and the two questions."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import av
import numpy as np

from videorepa.benchmarks._judged import Judged
from videorepa.benchmarks.mplug_owl.judge import OwlJudge, digest, frame_indices
from videorepa.data.video import read_squashed
from videorepa.system.device import pick_device


class Videophysics(Judged):
    """Semantic adherence (sa), physical commonsense (pc) and both at once (joint): whether the
    judge's score of a clip reaches a threshold."""

    def read(self, video: Path) -> np.ndarray:
        """The 32 frames that the judge sees, squashed to its size."""
        frames = read_squashed(video, self.live.side, self.live.side)
        return frames[frame_indices(len(frames))]

    @cached_property
    def live(self) -> OwlJudge:
        """The judge, loaded when it is first asked for."""
        return OwlJudge.load(self._folder, pick_device(), self._dtype)

    @cached_property
    def _judge_about(self) -> dict[str, str]:
        return {
            "model": "mPLUG-Owl-Video",
            "weights": digest(self._folder),
            "dtype": str(self._dtype).removeprefix("torch."),
            "frames": "32 of n, (n - 1) / 32 apart",
            "scaling": "squashed, bilinear, by FFmpeg",
            "decoder": f"PyAV {av.__version__}",
        }
