"""What benchmarks share whose clips a judge scores: flags, means, and which weights it has."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch

from videorepa.artifacts.scores import Row
from videorepa.benchmarks._listed import Listed
from videorepa.evaluation.pairs import Pairs, mean, share, sweep
from videorepa.system.device import Precision, compute_dtype, pick_device
from videorepa.system.hub import local_copy


class Judged(Listed):
    """For each of `metrics`, whether the judge's score of a clip reaches a threshold; and joint,
    whether it does so both for semantic adherence (sa) and for physical commonsense (pc).

    judge: the checkpoint's folder or its Hub id. Settings of `Listed` besides.
    score_names: what a row calls the scores, METRIC_NAME; the flags are of the first.
    thresholds: at which `aggregate` looks; the flags are of `threshold`.
    """

    judge: str
    precision: Precision = "auto"
    metrics: ClassVar[tuple[str, ...]] = ("sa", "pc")
    score_names: ClassVar[tuple[str, ...]]
    threshold: ClassVar[float]
    thresholds: ClassVar[tuple[float, ...]]

    def about(self) -> dict[str, Any]:
        return {"judge": self._judge_about | self.readout()}

    def readout(self) -> dict[str, str]:
        """How the judge is asked and its answer read, as far as settings say."""
        raise NotImplementedError

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Shares in percent, also at other thresholds, and mean scores."""
        found = {flag: share(rows, flag) for flag in self._flags}
        for metric in self.metrics:
            score = f"{metric}_{self.score_names[0]}"
            found[metric]["by_threshold"] = sweep(rows, score, self.thresholds)
        return found | {score: mean(rows, score) for score in self._scores}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A: flags in percentage points, and means of the scores. See `Pairs`."""
        return Pairs.of(rows_a, rows_b).compare(self._flags, self._scores)

    @property
    def _judge_about(self) -> dict[str, str]:
        """The judge itself: its weights, their dtype, and what it sees of a clip."""
        raise NotImplementedError

    @property
    def _flags(self) -> tuple[str, ...]:
        return (*self.metrics, "joint")

    @property
    def _scores(self) -> list[str]:
        return [f"{metric}_{name}" for name in self.score_names for metric in self.metrics]

    @property
    def _folder(self) -> Path:
        return local_copy(self.judge)

    @property
    def _dtype(self) -> torch.dtype:
        return compute_dtype(self.precision, pick_device())
