"""Measures how well the law checks work, on real clips and on clips that break one law each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np

from videorepa.benchmarks.laws.checks import CHECKS, score
from videorepa.evaluation.statistics import wilson
from videorepa.lab.calibration.corruptions import CORRUPTIONS
from videorepa.system import progress
from videorepa.world.render import Clip, make_clip

if TYPE_CHECKING:
    from matplotlib.figure import Figure


Reconstruct = Callable[[np.ndarray], np.ndarray]
"""Encodes and decodes clips: (N, F, SIZE, SIZE, 3) uint8 to the same."""

BATCH = 4
"""Clips to reconstruct at once. On a CPU, single clips take three times as long each. 8 or more are
slower again, and 16 take twice the memory."""

ASPECTS = ("sa", "pc", "joint")

Row = dict[str, Any]


def reconstructed(clips: Iterable[np.ndarray], reconstruct: Reconstruct) -> Iterator[np.ndarray]:
    """Reconstruct clips, (F, SIZE, SIZE, 3) uint8, with at most BATCH in memory at once."""
    waiting = iter(clips)
    while batch := list(islice(waiting, BATCH)):
        yield from reconstruct(np.stack(batch))


def judge(
    reconstruct: Reconstruct,
    clips: int,
    seed: int,
    tolerances: dict[str, float] | None = None,
    *,
    by_degrees: bool = True,
) -> list[Row]:
    """Judge real clips and broken ones with the checks.

    All clips but those of the kind "real" are reconstructed after they were broken. What fails
    among them beyond the kind "reconstructed" is therefore due to the broken law.

    Args:
        reconstruct: The autoencoder.
        clips: Number of clips to draw.
        seed: Seed of their series.
        tolerances: Those of the PC checks. By default those of the package.
        by_degrees: Whether to break clips with every strength, and not only with the greatest.

    Returns:
        A row for each kind and strength: kind; strength, which is None for clips that are not
        broken; n, the number of clips; sa, pc and joint, the shares in [0, 1] that pass; and
        failing, the share of clips that fail each check, most frequent first.
    """
    drawn = [make_clip(seed, index) for index in range(clips)]
    real = [clip.frames for clip in drawn]
    rows = [
        _judged_row("real", None, drawn, real, tolerances, lambda batch: batch),
        _judged_row("reconstructed", None, drawn, real, tolerances, reconstruct),
    ]
    for kind, corruption in CORRUPTIONS.items():
        for strength in corruption.strengths if by_degrees else corruption.strengths[-1:]:
            # In the same places at all strengths, so that a curve is about the same clips.
            broken = [
                corruption.broken(clip, seed, index, strength) for index, clip in enumerate(drawn)
            ]
            rows.append(_judged_row(kind, strength, drawn, broken, tolerances, reconstruct))
    return rows


def _judged_row(
    kind: str,
    strength: float | None,
    clips: Sequence[Clip],
    frames: Sequence[np.ndarray | None],
    tolerances: dict[str, float] | None,
    reconstruct: Reconstruct,
) -> Row:
    kept = [(clip.caption, x) for clip, x in zip(clips, frames, strict=True) if x is not None]
    shown = reconstructed((x for _, x in kept), reconstruct)
    name = kind if strength is None else f"{kind} {strength:g}"
    verdicts = [
        score(clip, caption, tolerances)
        for clip, (caption, _) in progress.track(
            zip(shown, kept, strict=True), f"judging {name}", total=len(kept)
        )
    ]
    n = len(verdicts)
    fails = {check: sum(not v.checks[check].passed for v in verdicts) for check in CHECKS}
    often = sorted(fails.items(), key=lambda item: -item[1])
    return {
        "kind": kind,
        "strength": strength,
        "n": n,
        "sa": sum(v.sa for v in verdicts) / max(n, 1),
        "pc": sum(v.pc for v in verdicts) / max(n, 1),
        "joint": sum(v.sa and v.pc for v in verdicts) / max(n, 1),
        "failing": {check: count / n for check, count in often if count},
    }


def strongest(rows: Sequence[Row]) -> list[Row]:
    """The rows of clips that are not broken, and of each corruption at its greatest strength."""
    return [
        row
        for row in rows
        if row["strength"] is None or row["strength"] == greatest_strength(row["kind"])
    ]


def greatest_strength(kind: str) -> float:
    return CORRUPTIONS[kind].strengths[-1]


def format_table(rows: Sequence[Row]) -> str:
    """Rows as a Markdown table that is also readable in a terminal. Shares are in percent."""
    lines = [
        f"| {'kind':<13} | {'n':>4} | {'SA':>5} | {'PC':>5} | {'joint':>5} | fails |",
        f"| {'-' * 13} | {'-' * 3}: | {'-' * 4}: | {'-' * 4}: | {'-' * 4}: | ----- |",
    ]
    for row in rows:
        shares = " | ".join(f"{100 * row[key]:5.1f}" for key in ASPECTS)
        failing = ", ".join(f"{name} {100 * part:.0f}" for name, part in row["failing"].items())
        lines.append(f"| {row['kind']:<13} | {row['n']:>4} | {shares} | {failing} |")
    return "\n".join(lines)


def format_degrees(rows: Sequence[Row]) -> str:
    """The percentage of broken clips that fail, by strength.

    It is a Markdown table with Wilson's 95 % intervals.
    """
    lines = [
        "| kind | strength | n | fail PC | fail PC or SA |",
        "| --- | ---: | ---: | --- | --- |",
    ]
    for row in rows:
        if row["strength"] is None:
            continue
        strength = CORRUPTIONS[row["kind"]].measured(row["strength"])
        cells = [row["kind"], strength, str(row["n"])]
        for key in ("pc", "joint"):
            share, low, high = _detected(row, key)
            cells.append(f"{100 * share:.0f} [{100 * low:.0f}, {100 * high:.0f}]")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _detected(row: Row, key: str) -> tuple[float, float, float]:
    """The share of clips that fail, and its interval."""
    failed = round((1 - row[key]) * row["n"])
    return (failed / max(row["n"], 1), *wilson(failed, row["n"]))


def draw_degrees(rows: Sequence[Row]) -> Figure:
    """Plot the share of clips that fail PC by strength, with axes for each corruption.

    The dotted line is the share of unbroken clips that fail.
    """
    from matplotlib.figure import Figure

    of_kind = {kind: [row for row in rows if row["kind"] == kind] for kind in CORRUPTIONS}
    curves = {kind: rows for kind, rows in of_kind.items() if len(rows) > 1}
    (unbroken,) = (row for row in rows if row["kind"] == "reconstructed")
    columns = 4
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(10, 2.3 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, sharey=True, squeeze=False)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (kind, curve) in zip(axes.flat, curves.items(), strict=False):
        shares = np.array([_detected(row, "pc") for row in curve]) * 100
        place = np.arange(len(curve))
        axis.axhline(100 * (1 - unbroken["pc"]), color="gray", linestyle=":")
        axis.fill_between(place, shares[:, 1], shares[:, 2], alpha=0.2, color="#1f6fb4", lw=0)
        axis.plot(place, shares[:, 0], marker="o", markersize=4, color="#1f6fb4")
        axis.set_xticks(place, [f"{row['strength']:g}" for row in curve])
        axis.set_title(kind, fontsize=10)
        axis.set_xlabel(CORRUPTIONS[kind].unit, fontsize=9)
        axis.set_ylim(-4, 104)
    for axis in axes[:, 0]:
        axis.set_ylabel("fail PC, %", fontsize=9)
    return figure
