"""What VideoPhy and VideoPhy-2 share: mPLUG-Owl-Video as the judge, and the two questions."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import av
import numpy as np
import torch

from videorepa.benchmarks import Pairs, Row, mean, share, sweep
from videorepa.benchmarks._listed import Listed
from videorepa.benchmarks.mplug_owl.judge import Judge, digest, frame_indices
from videorepa.data.video import read_squashed
from videorepa.device import Precision, compute_dtype, pick_device
from videorepa.hub import local_copy


class Videophysics(Listed):
    """Semantic adherence (sa), physical commonsense (pc) and both at once (joint): whether the
    judge's score of a clip reaches a threshold.

    judge: the checkpoint's folder or its Hub id. Settings of `Listed` besides.
    score_name: what a row calls the scores themselves: sa_NAME and pc_NAME.
    thresholds: at which `aggregate` looks; the flags are of `threshold`.
    """

    judge: str
    precision: Precision = "auto"
    score_name: ClassVar[str]
    threshold: ClassVar[float]
    thresholds: ClassVar[tuple[float, ...]]

    def about(self) -> dict[str, Any]:
        return {"judge": self._judge_about | self.readout()}

    def readout(self) -> dict[str, str]:
        """How the judge is asked and its answer read, as far as settings say."""
        raise NotImplementedError

    def read(self, video: Path) -> np.ndarray:
        """The 32 frames that the judge sees, squashed to its size."""
        frames = read_squashed(video, self.live.side, self.live.side)
        return frames[frame_indices(len(frames))]

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Shares in percent, also at other thresholds, and mean scores."""
        found = {flag: share(rows, flag) for flag in ("sa", "pc", "joint")}
        for metric, score in self._scores.items():
            found[metric]["by_threshold"] = sweep(rows, score, self.thresholds)
            found[score] = mean(rows, score)
        return found

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A: flags in percentage points, and means of the scores. See `Pairs`."""
        scores = list(self._scores.values())
        return Pairs.of(rows_a, rows_b).compare(("sa", "pc", "joint"), scores)

    @cached_property
    def live(self) -> Judge:
        """The judge, loaded when it is first asked for."""
        return Judge.load(self._folder, pick_device(), self._dtype)

    @property
    def _scores(self) -> dict[str, str]:
        return {metric: f"{metric}_{self.score_name}" for metric in ("sa", "pc")}

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

    @property
    def _folder(self) -> Path:
        return local_copy(self.judge)

    @property
    def _dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, pick_device())
