"""What benchmarks with a model as the judge share: flags, mean scores and the judge's identity."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import av
import torch

from videorepa.artifacts.scores import Better, Row
from videorepa.benchmarks._listed import Listed
from videorepa.evaluation.pairs import Pairs, mean, share, sweep
from videorepa.system.device import Precision, compute_dtype, pick_device
from videorepa.system.hub import local_copy


@dataclass(frozen=True)
class DigitAnswer:
    """A judge's answer to a question that asks for a digit.

    Attributes:
        value: The digit, or None if the judge answered anything else.
        text: The judge's words.
        probabilities: The probability of each allowed digit at the place of the answer. They sum
            to 1; {} if there is no such place.
    """

    value: int | None
    text: str
    probabilities: Mapping[str, float]

    @property
    def expected(self) -> float | None:
        """The mean digit under the probabilities, sum(d p(d))."""
        weighted = [int(digit) * share for digit, share in self.probabilities.items()]
        return sum(weighted) if weighted else None


class Judged(Listed):
    """A benchmark whose flags say whether a judge's score of a clip reaches a threshold.

    There is a flag for each of `metrics`, and `joint` for semantic adherence (sa) and physical
    commonsense (pc) at once.

    Attributes:
        judge: The checkpoint's folder or its id on the Hub.
        precision: What the judge computes in.
        score_names: A row holds the scores of a metric as METRIC_NAME for each of these names.
            Flags are about the first.
        threshold: The score from which a flag is set.
        thresholds: Further thresholds for `aggregate` to count at.
    """

    judge: str
    precision: Precision = "auto"
    metrics: ClassVar[tuple[str, ...]] = ("sa", "pc")
    score_names: ClassVar[tuple[str, ...]]
    threshold: ClassVar[float]
    thresholds: ClassVar[tuple[float, ...]]

    @classmethod
    def ranked_by(cls) -> dict[str, Better]:
        scores = [f"{metric}_{name}" for name in cls.score_names for metric in cls.metrics]
        return dict.fromkeys([*scores, *cls.metrics, "joint"], "higher")

    def about(self) -> dict[str, Any]:
        return {
            "judge": {
                **self._identity,
                "dtype": str(self._dtype).removeprefix("torch."),
                "decoder": f"PyAV {av.__version__}",
                **self.readout(),
            }
        }

    def load(self) -> None:
        _ = self.live

    @abstractmethod
    def readout(self) -> dict[str, str]:
        """How the judge is asked and how its answer is read, as far as settings decide."""

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """Flags as percentages, also at the other thresholds, and mean scores."""
        metrics = {flag: share(rows, flag) for flag in self._flags}
        for metric in self.metrics:
            score = f"{metric}_{self.score_names[0]}"
            metrics[metric]["by_threshold"] = sweep(rows, score, self.thresholds)
        return metrics | {score: mean(rows, score) for score in self._scores}

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B minus A: flags in percentage points and mean scores. See `Pairs.compare`."""
        return Pairs.of(rows_a, rows_b).compare(self._flags, self._scores)

    def rated(self, metric: str, rating: DigitAnswer) -> Row:
        """The columns of a metric whose score is a rating."""
        return {
            metric: None if rating.value is None else rating.value >= self.threshold,
            f"{metric}_rating": rating.value,
            f"{metric}_expected": rating.expected,
            f"{metric}_probabilities": rating.probabilities,
        }

    @staticmethod
    def joint(row: Row) -> bool | None:
        """Whether both flags are set, or None if either is invalid."""
        both = row["sa"], row["pc"]
        return None if None in both else all(both)

    @property
    @abstractmethod
    def live(self) -> Any:
        """The judge, loaded on first use."""

    @property
    @abstractmethod
    def _identity(self) -> dict[str, str]:
        """The judge's model and weights, and what it sees of a clip."""

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
