"""Physics-IQ (Motamed et al. 2025, arXiv 2501.09038): filmed experiments, continued by a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from jaxtyping import Float

from videorepa.artifacts.scores import Row
from videorepa.benchmarks._physics_iq import VERIFIED, Filmed, experiment, keys
from videorepa.errors import UserError
from videorepa.evaluation.pairs import Pairs
from videorepa.evaluation.statistics import bootstrap, swap


def score(clips: Float[np.ndarray, "... 4"], takes: Float[np.ndarray, "... 4"]) -> np.ndarray:
    """The Physics-IQ score, 0 to 100.

    It is 100 (mean of IoU of clips / IoU of takes - (MSE of clips - MSE of takes)), clipped.

    Args:
        clips: Mean metrics of the clips and the first takes, in the order of METRICS.
        takes: Mean metrics of the first takes and the second ones.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = clips[..., 1:] / takes[..., 1:]
    return 100.0 * np.clip(shares.mean(-1) - (clips[..., 0] - takes[..., 0]), 0.0, 1.0)


class PhysicsIQ(Filmed):
    """Physics-IQ's score of continuations: 100 is as good as a second take."""

    name: Literal["physics_iq"] = "physics_iq"
    version: ClassVar[str] = "3"

    @property
    def root(self) -> Path:
        if self.data.resolve().name == VERIFIED:
            raise UserError(
                f"{self.data} holds the films of the refined benchmark, which have other scores. "
                "Score with physics_iq_verified, or give the folder of the first version's files."
            )
        return super().root

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """The scores of the clips (score) and of repeating the first frame (static_score), with
        bootstrap intervals over experiments, and the mean metrics behind them.

        n counts experiments.
        """
        values = _by_experiment(rows)
        metrics: dict[str, dict[str, Any]] = {}
        for name, columns in (("score", slice(0, 4)), ("static_score", slice(8, 12))):

            def scored(means: np.ndarray, columns: slice = columns) -> np.ndarray:
                return score(means[..., columns], means[..., 4:8])

            low, high = bootstrap(values, scored)
            percent = float(scored(values.mean(0)))
            metrics[name] = {"percent": percent, "low": low, "high": high, "n": len(values)}
        for place, key in enumerate(keys()):
            metrics[key] = {"mean": float(values[:, place].mean()), "n": len(values)}
        return metrics

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B's score minus A's, with its bootstrap interval over experiments and its p-value.

        p is a permutation test's, which exchanges the two models in random experiments.
        """
        paired = Pairs.of(rows_a, rows_b)
        a, b = (_by_experiment([pair[side] for pair in paired.pairs]) for side in (0, 1))

        def difference(means: np.ndarray) -> np.ndarray:
            ours, theirs = means[..., 12:], means[..., :12]
            return score(ours[..., :4], ours[..., 4:8]) - score(theirs[..., :4], theirs[..., 4:8])

        both = np.concatenate([a, b], 1)
        low, high = bootstrap(both, difference)
        return {
            "score": {
                "difference": float(difference(both.mean(0))),
                "low": low,
                "high": high,
                "n": len(both),
                "p": swap(a, b, lambda x, y: difference(np.concatenate([x, y], -1))),
            },
            "unpaired": paired.unpaired,
        }


def _by_experiment(rows: Sequence[Row]) -> Float[np.ndarray, "n 12"]:
    """Mean metrics of each experiment over its views."""
    of: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        of[experiment(row["caption"])].append([row[key] for key in keys()])
    return np.array([np.mean(views, 0) for _, views in sorted(of.items())])
