"""Scores generated clips: a row each, a table with intervals, a paired comparison."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videorepa import plugins
from videorepa.benchmarks import Benchmark
from videorepa.data.files import atomic_write
from videorepa.data.video import read_all
from videorepa.errors import ClipError, UserError
from videorepa.progress import track


@dataclass(frozen=True)
class Evaluation:
    """summary: the benchmark's metrics, in all and by scenario, and what could not be scored.
    comparison: against the other folder, if one was given. Both as they stand in `out`."""

    out: Path
    summary: dict[str, Any]
    comparison: dict[str, Any] | None = None


def evaluate(
    benchmark: str, videos: Path, out: Path | None = None, *, against: Path | None = None
) -> Evaluation:
    """Score every clip in `videos` (as `generate` leaves them) into `out`, by default its `scores`,
    against its caption.

    against: another folder of clips of the same prompts and seeds; it is scored too, and the
    comparison is paired clip by clip. Rows that are there already are kept if they are of the same
    benchmark version and clip. A clip that cannot be read costs that clip alone: it is counted and
    named among the failures, never scored 0. Raises UserError for a folder without clips.
    """
    bench = plugins.benchmark(benchmark)
    out = out or videos / "scores"
    rows, failures = _score(bench, videos, out)
    if not rows:
        raise UserError(
            f"None of the {len(failures)} clips in {videos} can be scored; the first: "
            f"{failures[0]['reason']}"
        )
    summary = {
        "benchmark": bench.name,
        "version": bench.version,
        "n": len(rows),
        "metrics": bench.aggregate(rows),
        "by_scenario": {
            name: bench.aggregate([row for row in rows if row["scenario"] == name])
            for name in sorted({row["scenario"] for row in rows if row["scenario"]})
        },
        "failures": failures,
    }
    atomic_write(out / "summary.json", json.dumps(summary, indent=1))
    comparison = None
    if against is not None:
        others, _ = _score(bench, against, against / "scores")
        metrics = bench.compare(others, rows)
        unpaired = metrics.pop("unpaired")
        comparison = {"against": against.resolve().name, "unpaired": unpaired, "metrics": metrics}
        atomic_write(out / "comparison.json", json.dumps(comparison, indent=1))
    return Evaluation(out, summary, comparison)


def _score(
    bench: Benchmark, videos: Path, out: Path
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    sidecars = list(_sidecars(videos))
    if not sidecars:
        raise UserError(f"{videos} holds no generated clips (an .mp4 and a .json each).")
    out.mkdir(parents=True, exist_ok=True)
    path = out / "scores.jsonl"
    known = _known_rows(path, bench)
    rows, failures = [], []
    with path.open("a", encoding="utf-8") as file:
        for video, about in track(sidecars, f"evaluate {videos.name}"):
            key = (about["prompt_id"], about["k"], about.get("model_digest"))
            row = known.get(key)
            if row is None:
                try:
                    frames, _ = read_all(video)
                    score = bench.score(frames, about["caption"])
                except (ClipError, UserError) as error:
                    failures.append({"prompt_id": key[0], "k": key[1], "reason": str(error)})
                    continue
                row = {
                    "prompt_id": key[0],
                    "k": key[1],
                    "scenario": bench.scenario(about["caption"]),
                    "model_digest": key[2],
                    "benchmark": f"{bench.name} {bench.version}",
                    **score,
                }
                file.write(json.dumps(row) + "\n")
                file.flush()
            rows.append(row)
    return rows, failures


def _sidecars(videos: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(videos.glob("*.json")):
        # Hidden names are what a killed process left behind.
        if path.name == "generation.json" or path.name.startswith("."):
            continue
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            yield (
                path.with_suffix(".mp4"),
                about
                | {
                    "prompt_id": str(about["prompt_id"]),
                    # What it was generated from, unless that was a detailed version of it.
                    "caption": str(about.get("caption", about["prompt"])),
                    "k": int(about["k"]),
                },
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a sidecar that `generate` wrote ({type(error).__name__}: {error}). "
                "Remove it, or generate its clip again."
            ) from None


def _known_rows(path: Path, bench: Benchmark) -> dict[tuple[str, int, Any], dict[str, Any]]:
    if not path.exists():
        return {}
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue  # A killed process leaves half a line; its clip is scored again.
    of_this = f"{bench.name} {bench.version}"
    same = [row for row in rows if isinstance(row, dict) and row.get("benchmark") == of_this]
    atomic_write(path, "".join(json.dumps(row) + "\n" for row in same))
    return {(row["prompt_id"], row["k"], row.get("model_digest")): row for row in same}


def table(evaluations: dict[str, Evaluation]) -> str:
    """A plain table: a line per model, with every share's 95 % interval."""
    lines = []
    for name, found in evaluations.items():
        cells = [
            f"{key} {value['percent']:5.1f} [{value['low']:.1f}, {value['high']:.1f}]"
            for key, value in found.summary["metrics"].items()
            if "percent" in value
        ]
        failed = len(found.summary["failures"])
        note = f"  ({failed} clips could not be read)" if failed else ""
        lines.append(f"{name:10s} n={found.summary['n']:<4d} " + "   ".join(cells) + note)
        if found.comparison:
            for key, value in found.comparison["metrics"].items():
                lines.append(
                    f"{'':10s} {key} {value['difference']:+.1f} points "
                    f"[{value['low']:+.1f}, {value['high']:+.1f}], p = {value['p']:.3f}, "
                    f"against {found.comparison['against']}"
                )
    return "\n".join(lines)
