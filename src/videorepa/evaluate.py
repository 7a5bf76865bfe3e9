"""Scores generated clips: a row each, a table with intervals, a paired comparison."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videorepa.artifacts.clips import clips_of_folder, clips_of_list
from videorepa.artifacts.scores import Evaluation, Row, clip_key, known_rows, result_folder
from videorepa.benchmarks import Benchmark
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.statistics import holm
from videorepa.settings import plugins
from videorepa.system.checks import check_shard
from videorepa.system.files import atomic_write, short_name
from videorepa.system.progress import track


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
    check_shard(shard)
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
    if shard[1] > 1:
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
        shared = {clip_key(row)[:2] for row in rows} & {
            clip_key(row)[:2] for row in theirs.get(name, ())
        }
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


def _score(bench: Benchmark, videos: Path, out: Path, shard: tuple[int, int]) -> _Scored:
    clips = list(
        clips_of_list(videos)
        if videos.is_file()
        else bench.clips(videos) or clips_of_folder(videos)
    )
    if not clips:
        raise UserError(f"{videos} holds no generated clips (an .mp4 and a .json each).")
    index, count = shard
    out.mkdir(parents=True, exist_ok=True)
    name = "scores.jsonl" if count == 1 else f"scores-{index}-of-{count}.jsonl"
    same = {"benchmark": f"{bench.name} {bench.version}", **bench.about()}
    known = known_rows(out, same)
    part = clips[index::count]
    kept = {clip_key(about): row for _, about in part if (row := known.get(clip_key(about)))}
    # Only this process writes this file: what others have written is taken over, in order.
    atomic_write(out / name, "".join(json.dumps(row) + "\n" for row in kept.values()))
    rows, failures = [], []
    with (out / name).open("a", encoding="utf-8") as file:
        for video, about in track(part, f"evaluate {videos.name}"):
            clip = prompt_id, k, model = clip_key(about)
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
