"""What the law checks are worth: how they judge real clips and clips that break one law each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np

from videorepa import progress
from videorepa.lab.laws import CHECKS, score
from videorepa.lab.render import Clip, make_clip, render
from videorepa.lab.world import FLOOR, SIZE, Ball

Reconstruct = Callable[[np.ndarray], np.ndarray]
"""Clips through an autoencoder and back: (N, F, SIZE, SIZE, 3) uint8 to the same."""
BATCH = 4
"""Clips that are reconstructed at once. One by one, each takes a CPU three times as long; from 8
on it gets slower again, and 16 take twice the memory."""


def reconstructed(clips: Iterable[np.ndarray], reconstruct: Reconstruct) -> Iterator[np.ndarray]:
    """Each clip, (F, SIZE, SIZE, 3) uint8, as the autoencoder shows it; few are held at a time."""
    waiting = iter(clips)
    while batch := list(islice(waiting, BATCH)):
        yield from reconstruct(np.stack(batch))


@dataclass(frozen=True)
class Corruption:
    """A way to break a clip.

    apply: the broken frames, or None for a clip that cannot be broken so. what: in words.
    caught_by: the check that is there to find it, and when.
    """

    apply: Callable[[Clip, np.random.Generator], np.ndarray | None]
    what: str
    caught_by: str


def _shuffled(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    return clip.frames[rng.permutation(len(clip.frames))]


def _reversed(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    return clip.frames[::-1]


def _frozen(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    return clip.frames[:1].repeat(len(clip.frames), axis=0)


def _vanishing(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    return _moved(clip, _seen_frame(clip, rng), (-10.0 * SIZE, 0.0))


def _teleport(clip: Clip, rng: np.random.Generator) -> np.ndarray:
    positions = clip.trajectory.positions[:, 0, 0]
    back = -12.0 if positions[-1] > positions[0] else 12.0
    return _moved(clip, _seen_frame(clip, rng), (back, 0.0))


def _floating(clip: Clip, rng: np.random.Generator) -> np.ndarray | None:
    (ball, *others) = clip.scene.bodies
    if others or clip.scene.planks or not isinstance(ball, Ball):
        return None
    if ball.position[1] + ball.radius > FLOOR - 1:
        return None
    time = np.arange(len(clip.frames), dtype=np.float32)[:, None, None]
    velocity = np.array([ball.velocity[0], 0.0], np.float32)
    positions = np.array(ball.position, np.float32) + velocity * time
    return render(clip.scene, replace(clip.trajectory, positions=positions))


def _seen_frame(clip: Clip, rng: np.random.Generator) -> int:
    """A frame, not among the first or last four, in which all of the first body is in view and is
    not behind the screen; the fifth if there is none."""
    x, radius = clip.trajectory.positions[:, 0, 0], np.sqrt(clip.scene.bodies[0].area / np.pi)
    seen = (x > radius + 1) & (x < SIZE - radius - 1)
    if clip.scene.screen is not None:
        seen &= (x < clip.scene.screen.left - radius) | (x > clip.scene.screen.right + radius)
    frames = np.flatnonzero(seen[4:-4]) + 4
    return int(rng.choice(frames)) if len(frames) else 4


def _moved(clip: Clip, since: int, by: tuple[float, float]) -> np.ndarray:
    positions = clip.trajectory.positions.copy()
    positions[since:, 0] += by
    return render(clip.scene, replace(clip.trajectory, positions=positions))


CORRUPTIONS: dict[str, Corruption] = {
    "shuffled": Corruption(
        _shuffled, "the frames in random order", "`continuity`, and `event` with it"
    ),
    "reversed": Corruption(
        _reversed,
        "the frames from the last to the first",
        "`direction` where the caption names a side; `energy` where a bounce gains height by it",
    ),
    "frozen": Corruption(
        _frozen,
        "the first frame, all the time",
        "`event`, always; `gravity` and `arc` where a body is left hanging",
    ),
    "vanishing": Corruption(
        _vanishing,
        "the first body is gone from a frame on in which it would be seen",
        "`permanence`",
    ),
    "teleport": Corruption(
        _teleport,
        "from one frame on the first body is 12 pixels farther back on its way",
        "`continuity`",
    ),
    "floating": Corruption(
        _floating,
        "a ball that starts in the air, alone, goes straight on, without gravity",
        "`gravity` and `arc`",
    ),
}


def table(
    reconstruct: Reconstruct,
    clips: int,
    seed: int,
    tolerances: dict[str, float] | None = None,
) -> list[dict[str, Any]]:
    """How the checks judge real clips and broken ones.

    Every row but "real" goes through `reconstruct` after it was broken, so that what fails is due
    to the law. A row holds: kind; n; sa, pc, joint, shares in [0, 1]; failing, for each check the
    share of the row's clips that fail it, most frequent first.
    """
    drawn = [make_clip(seed, index) for index in range(clips)]
    rows = []
    for kind in ("real", "reconstructed", *CORRUPTIONS):
        frames: list[np.ndarray | None] = [clip.frames for clip in drawn]
        if kind in CORRUPTIONS:
            apply = CORRUPTIONS[kind].apply
            frames = [apply(clip, np.random.default_rng([seed, i])) for i, clip in enumerate(drawn)]
        captions = [c.caption for c, shown in zip(drawn, frames, strict=True) if shown is not None]
        shown = (clip for clip in frames if clip is not None)
        if kind != "real":
            shown = reconstructed(shown, reconstruct)
        verdicts = [
            score(clip, caption, tolerances)
            for clip, caption in progress.track(
                zip(shown, captions, strict=True), f"judging {kind} clips", total=len(captions)
            )
        ]
        n = len(verdicts)
        fails = {name: sum(not v.checks[name].passed for v in verdicts) for name in CHECKS}
        rows.append(
            {
                "kind": kind,
                "n": n,
                "sa": sum(v.sa for v in verdicts) / max(n, 1),
                "pc": sum(v.pc for v in verdicts) / max(n, 1),
                "joint": sum(v.sa and v.pc for v in verdicts) / max(n, 1),
                "failing": {
                    name: count / n
                    for name, count in sorted(fails.items(), key=lambda item: -item[1])
                    if count
                },
            }
        )
    return rows


def format_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows of `table` as a Markdown table that also reads well in a terminal; shares are in
    percent."""
    lines = [
        f"| {'kind':<13} | {'n':>4} | {'SA':>5} | {'PC':>5} | {'joint':>5} | fails |",
        f"| {'-' * 13} | {'-' * 3}: | {'-' * 4}: | {'-' * 4}: | {'-' * 4}: | ----- |",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * row[key]:5.1f}" for key in ("sa", "pc", "joint"))
        failing = ", ".join(f"{name} {100 * part:.0f}" for name, part in row["failing"].items())
        lines.append(f"| {row['kind']:<13} | {row['n']:>4} | {shares} | {failing} |")
    return "\n".join(lines)
