"""Scores generated clips: a row each, a table with intervals, a paired comparison."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videorepa import plugins
from videorepa.benchmarks import Benchmark, Row
from videorepa.data.files import atomic_write, short_name
from videorepa.data.manifest import read_manifest
from videorepa.errors import ClipError, UserError
from videorepa.progress import track
from videorepa.statistics import holm


@dataclass(frozen=True)
class Evaluation:
    """summary: the benchmark's metrics, in all and by scenario, and what could not be scored.
    comparison: against the other folder, if one was given. Both as they stand in `out`."""

    out: Path
    summary: dict[str, Any]
    comparison: dict[str, Any] | None = None


@dataclass(frozen=True)
class _Scored:
    """rows: of all clips with a score. failures: the clips without, and why."""

    rows: list[Row]
    failures: list[dict[str, Any]]
    missing: list[dict[str, Any]]


def evaluate(
    benchmark: str,
    videos: Path,
    out: Path | None = None,
    *,
    against: Path | None = None,
    settings: Sequence[str] = (),
    shard: tuple[int, int] = (0, 1),
) -> Evaluation:
    """Score every clip in `videos` against its caption into `out`, by default its `scores`; beside
    a list, NAME.scores.

    videos: a folder as `generate` leaves it; or a .csv or .jsonl file that lists clips made
        elsewhere, as for `prepare`, whose `id` names the prompt.
    against: another such folder or list of the same prompts and seeds; it is scored too, and the
        comparison is paired clip by clip.
    settings: of the benchmark, each `key=value`.
    shard: (i, n) scores every n-th clip from the i-th, into a row file of its own, and writes no
        tables; the same call without it then takes the rows of all shards together.
    Rows that are there already are kept if they are of the same clip and were scored the same way.
    A clip that cannot be read costs that clip alone: it is counted and named among the failures,
    as are those of the benchmark's prompts that have no clip; none is scored 0. Raises UserError
    for a folder without clips.
    """
    index, count = shard
    if not 0 <= index < count:
        raise UserError(f"The shard {index}/{count} does not exist; give i/n with 0 <= i < n.")
    bench = plugins.benchmark(benchmark, settings)
    out = out or result_folder(videos, "scores")
    scored = _score(bench, videos, out, shard)
    others = (
        None if against is None else _score(bench, against, result_folder(against, "scores"), shard)
    )
    if scored.failures and not scored.rows:
        raise UserError(
            f"None of the {len(scored.failures)} clips in {videos} can be scored; the first: "
            f"{scored.failures[0]['reason']}"
        )
    summary = {
        "benchmark": bench.name,
        "version": bench.version,
        **bench.about(),
        "n": len(scored.rows),
        "metrics": bench.aggregate(scored.rows),
        "by_scenario": {
            name: bench.aggregate(rows) for name, rows in _by_scenario(scored.rows).items()
        },
        "failures": scored.failures,
        "missing": scored.missing,
    }
    if count > 1:
        return Evaluation(out, summary)
    atomic_write(out / "summary.json", json.dumps(summary, indent=1))
    if against is None or others is None:
        return Evaluation(out, summary)
    comparison = _compare(bench, others.rows, scored.rows) | {"against": short_name(against)}
    atomic_write(out / "comparison.json", json.dumps(comparison, indent=1))
    return Evaluation(out, summary, comparison)


def _compare(bench: Benchmark, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
    metrics = bench.compare(rows_a, rows_b)
    unpaired = metrics.pop("unpaired")
    theirs = _by_scenario(rows_a)
    by_scenario = {}
    for name, rows in _by_scenario(rows_b).items():
        shared = {_clip(row)[:2] for row in rows} & {_clip(row)[:2] for row in theirs.get(name, ())}
        if shared:
            by_scenario[name] = bench.compare(theirs[name], rows)
            del by_scenario[name]["unpaired"]
    # All that the comparison claims is one family.
    every = [claim for found in (metrics, *by_scenario.values()) for claim in found.values()]
    claims = [claim for claim in every if "p" in claim]
    for claim, p in zip(claims, holm([claim["p"] for claim in claims]), strict=True):
        claim["p_holm"] = p
    return {"unpaired": unpaired, "metrics": metrics, "by_scenario": by_scenario}


def _by_scenario(rows: Iterable[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        if row["scenario"]:
            found[row["scenario"]].append(row)
    return dict(sorted(found.items()))


def result_folder(videos: Path, name: str) -> Path:
    """Where what is found about clips is kept: within their folder, or beside their list."""
    return videos.with_suffix(f".{name}") if videos.is_file() else videos / name


def _score(bench: Benchmark, videos: Path, out: Path, shard: tuple[int, int]) -> _Scored:
    clips = list(_listed(videos) if videos.is_file() else bench.clips(videos) or _sidecars(videos))
    if not clips:
        raise UserError(f"{videos} holds no generated clips (an .mp4 and a .json each).")
    index, count = shard
    out.mkdir(parents=True, exist_ok=True)
    name = "scores.jsonl" if count == 1 else f"scores-{index}-of-{count}.jsonl"
    same = {"benchmark": f"{bench.name} {bench.version}", **bench.about()}
    known = _known_rows(out, same)
    part = clips[index::count]
    kept = {_clip(about): row for _, about in part if (row := known.get(_clip(about)))}
    # Only this process writes this file: what others have written is taken over, in order.
    atomic_write(out / name, "".join(json.dumps(row) + "\n" for row in kept.values()))
    rows, failures = [], []
    with (out / name).open("a", encoding="utf-8") as file:
        for video, about in track(part, f"evaluate {videos.name}"):
            clip = prompt_id, k, model = _clip(about)
            row = kept.get(clip)
            if row is None:
                try:
                    score = bench.score(bench.read(video), about["caption"])
                    scenario = bench.scenario(about["caption"])
                except (ClipError, UserError) as error:
                    failures.append({"prompt_id": prompt_id, "k": k, "reason": str(error)})
                    continue
                whose = {"prompt_id": prompt_id, "k": k, "scenario": scenario}
                row = whose | {"model_digest": model} | same | score
                file.write(json.dumps(row) + "\n")
                file.flush()
            rows.append(row)
    return _Scored(rows, failures, _missing(bench, [about for _, about in clips]))


def _missing(bench: Benchmark, clips: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The benchmark's own prompts that have no clip, for every sample number that occurs."""
    prompts: dict[int, set[str]] = defaultdict(set)
    for about in clips:
        prompts[about["k"]].add(about["caption"])
    return [
        {"prompt_id": prompt.id, "k": k, "prompt": prompt.caption}
        for k, there in sorted(prompts.items())
        for prompt in bench.missing(there)
    ]


def _clip(about: dict[str, Any]) -> tuple[str, int, Any]:
    return about["prompt_id"], about["k"], about.get("model_digest")


def _listed(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for entry in read_manifest(path):
        yield entry.path, {"prompt_id": entry.id, "caption": entry.caption, "k": 0}


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


def _known_rows(out: Path, same: dict[str, Any]) -> dict[tuple[str, int, Any], Row]:
    """The rows of all row files in which these keys have the same values."""
    known = {}
    for path in sorted(out.glob("scores*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue  # A killed process leaves half a line; its clip is scored again.
            if isinstance(row, dict) and {key: row.get(key) for key in same} == same:
                known[_clip(row)] = row
    return known


def table(evaluations: dict[str, Evaluation], by_scenario: bool = False) -> str:
    """A plain table: a line per model, with every share's 95 % interval; of a benchmark without
    shares, every mean's.

    by_scenario: and a line for each of the scenarios below it.
    """
    lines = []
    for name, found in evaluations.items():
        summary = found.summary
        what = {"could not be read": "failures", "are missing": "missing"}
        notes = [f"{n} clips {said}" for said, key in what.items() if (n := len(summary[key]))]
        note = f"  ({', '.join(notes)})" if notes else ""
        lines.append(f"{name:10s} n={summary['n']:<4d} {_values(summary['metrics'])}{note}")
        scenarios = summary["by_scenario"] if by_scenario else {}
        lines += [f"  {of:15s} {_values(metrics)}" for of, metrics in scenarios.items()]
        if found.comparison is None:
            continue
        parts = {"": found.comparison["metrics"]}
        if by_scenario:
            parts |= {f"{of} ": m for of, m in found.comparison["by_scenario"].items()}
        shown = _shown(summary["metrics"])
        for of, metrics in parts.items():
            for key, value in metrics.items():
                if key not in shown:
                    continue
                if "p" in value:
                    lines.append(
                        f"{'':10s} {of}{key} {value['difference']:+.1f} points "
                        f"[{value['low']:+.1f}, {value['high']:+.1f}], p = {value['p']:.3f} "
                        f"({value['p_holm']:.3f} as one of a family), "
                        f"against {found.comparison['against']}"
                    )
                else:
                    lines.append(
                        f"{'':10s} {of}{key} {value['difference']:+.4f} "
                        f"[{value['low']:+.4f}, {value['high']:+.4f}], "
                        f"against {found.comparison['against']}"
                    )
    return "\n".join(lines)


def _shown(metrics: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The shares, or all of a benchmark that has none."""
    return {key: value for key, value in metrics.items() if "percent" in value} or metrics


def _values(metrics: dict[str, dict[str, Any]]) -> str:
    return "   ".join(
        _value(key, value, "percent", ".1f")
        if "percent" in value
        else _value(key, value, "mean", ".4f")
        for key, value in _shown(metrics).items()
    )


def _value(key: str, value: dict[str, Any], kind: str, digits: str) -> str:
    invalid = f" ({value['invalid']} invalid)" if value.get("invalid") else ""
    # Without a valid row there is no value, and no interval of a mean.
    if value[kind] is None:
        return f"{key} none{invalid}"
    interval = f" [{value['low']:{digits}}, {value['high']:{digits}}]" if "low" in value else ""
    return f"{key} {value[kind]:5{digits}}{interval}{invalid}"
