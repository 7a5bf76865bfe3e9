"""What to expect of the best of n clips, from the N clips that a prompt has.

The best of all N is a lucky draw, and so is the best of the first n. Here every subset of n clips
counts alike, so that each point is unbiased for the best of n fresh clips.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import comb

import numpy as np
from jaxtyping import Float

from videorepa.artifacts.selection import BestOfPoint
from videorepa.evaluation.statistics import paired_bootstrap


def chances(goodness: Float[np.ndarray, " N"], n: int) -> Float[np.ndarray, " N"]:
    """The probability of each of N clips to be the best of n that are drawn without replacement.

    The clip at rank i from below is the best of C(i - 1, n - 1) of the C(N, n) subsets. Where
    clips are equally good, one of the best in a subset is taken at random, so that they share
    theirs equally: of clips at ranks a + 1 to b, (C(b, n) - C(a, n)) / C(N, n) in all.

    Args:
        goodness: Larger is better. Finite.
        n: 1 to N.

    Raises:
        ValueError: n is out of range.
    """
    total = len(goodness)
    if not 1 <= n <= total:
        raise ValueError(f"Found n = {n} for {total} clips; expected 1 to {total}.")
    ordered = np.sort(goodness)
    below = np.searchsorted(ordered, goodness, "left").tolist()
    up_to = np.searchsorted(ordered, goodness, "right").tolist()
    return np.array(
        [
            (comb(b, n) - comb(a, n)) / (comb(total, n) * (b - a))
            for a, b in zip(below, up_to, strict=True)
        ]
    )


@dataclass(frozen=True)
class PromptSamples:
    """A prompt's clips.

    Attributes:
        subject: Prompts of one subject are alike, and one cluster.
        goodness: What clips are chosen by; larger is better.
        score: The same as it is measured.
        judged: Another score of the same clips; NaN if there is none.
        motion: Their motion.
    """

    subject: str
    goodness: Float[np.ndarray, " N"]
    score: Float[np.ndarray, " N"]
    judged: Float[np.ndarray, " N"]
    motion: Float[np.ndarray, " N"]


Quantity = Callable[[PromptSamples], Float[np.ndarray, " N"]]


def best_of(
    prompts: Sequence[PromptSamples],
    quantity: Quantity,
    most: int,
    unit: float = 1.0,
) -> list[BestOfPoint]:
    """The mean over prompts of a quantity of the best clip of n, for n from 1 to `most`.

    Args:
        prompts: One or more, each with `most` clips or more.
        quantity: What is asked of the clip that is chosen.
        unit: What values are multiplied by.
    """
    expected = np.array(
        [
            [unit * chances(prompt.goodness, n) @ quantity(prompt) for n in range(1, most + 1)]
            for prompt in prompts
        ]
    )
    subjects = [prompt.subject for prompt in prompts]
    points = []
    for place, values in enumerate(expected.T):
        changes = values - expected[:, 0]
        low, high = paired_bootstrap(_clusters(subjects, values))
        change_low, change_high = paired_bootstrap(_clusters(subjects, changes))
        points.append(
            BestOfPoint(
                n=place + 1,
                mean=float(values.mean()),
                low=low,
                high=high,
                change=float(changes.mean()),
                change_low=change_low,
                change_high=change_high,
            )
        )
    return points


def _clusters(subjects: Sequence[str], values: Float[np.ndarray, " p"]) -> list[list[float]]:
    clusters: dict[str, list[float]] = defaultdict(list)
    for subject, value in zip(subjects, values.tolist(), strict=True):
        clusters[subject].append(value)
    return list(clusters.values())
