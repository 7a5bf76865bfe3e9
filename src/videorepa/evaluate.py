"""Scores generated clips: a row per clip, metrics with intervals, and a paired comparison."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from videorepa.artifacts.clips import GENERATION, CaptionedClip, clip_digest, clips_of
from videorepa.artifacts.scores import (
    Row,
    Scores,
    Summary,
    claim_benchmark_folder,
    clip_key,
    earlier_rows,
    row_line,
    write_rows,
)
from videorepa.artifacts.selection import optimism
from videorepa.benchmarks import Benchmark
from videorepa.data.video import READER
from videorepa.errors import ClipError, UserError, within_memory
from videorepa.evaluation.pairs import by_scenario, compared
from videorepa.remedies import in_scoring
from videorepa.settings import plugins
from videorepa.system.checks import check_shard
from videorepa.system.files import short_name
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import console, track
from videorepa.system.wording import count


@dataclass(frozen=True)
class _Scored:
    """What came of scoring a folder's clips.

    Attributes:
        folder: Where the scores are kept.
        rows: The clips that could be scored.
        failures: The clips that could not, each with its reason.
        missing: The benchmark's prompts that have no clip.
        left_over: The clips of prompts that are no longer generated.
    """

    folder: Path
    rows: list[Row]
    failures: list[dict[str, Any]]
    missing: list[dict[str, Any]]
    left_over: list[dict[str, Any]]


@within_memory(in_scoring())
def evaluate(
    benchmark: str,
    videos: Path,
    out: Path | None = None,
    *,
    against: Path | None = None,
    settings: Sequence[str] = (),
    shard: tuple[int, int] = (0, 1),
) -> Scores:
    """Score every clip against its caption.

    A row that is there already is kept if the same video was scored against the same caption in
    the same way, whatever the clip is called. A clip that cannot be read is listed as a failure,
    and a prompt of the benchmark that has no clip as missing. Neither is scored 0, and neither
    stops the others. A clip of a prompt that `generate` was not last told to make is left over: it
    is listed and not scored.

    Args:
        benchmark: Name of the benchmark.
        videos: A folder in the layout of `generate`; or a .csv or .jsonl file that lists clips made
            elsewhere, as for `prepare`, whose `id` names the prompt.
        out: Folder of the scores; by default `scores` in the clips' folder, or NAME.scores beside
            their list. Where that holds another benchmark's, it is `scores-BENCHMARK`.
        against: Another such folder or list, of the same prompts and seeds. It is scored too, into
            its own default folder, and the two are compared clip by clip.
        settings: Settings of the benchmark, each `key=value`.
        shard: (i, n) scores every n-th clip, starting at the i-th, into a row file of its own, and
            writes no tables. The same call without it then combines the rows of all shards.

    Raises:
        UserError: There are no clips, none can be scored, a sidecar is damaged, or the two cannot
            be compared; the scores of `videos` are kept then.
    """
    check_shard(shard)
    bench = plugins.benchmark(benchmark, settings)
    if against is not None and not bench.results(against)[0]:
        _clips(bench, against)  # Refused before the others are scored.
    scored = _score(bench, videos, out, shard)
    theirs = None
    if against is not None:
        theirs = _score(bench, against, None, shard)
    _check_some(scored, videos)
    about = bench.about()
    folders = [videos] if against is None else [videos, against]
    summary = Summary.model_validate(
        {
            "benchmark": bench.name,
            "version": bench.version,
            "about": about.get("about"),
            "asked": {key: value for key, value in about.items() if key != "about"},
            "notes": [*filter(None, (optimism(folder, bench.name) for folder in folders))],
            "n": len(scored.rows),
            # A shard can be without clips.
            "metrics": bench.aggregate(scored.rows) if scored.rows else {},
            "by_scenario": {
                name: bench.aggregate(rows) for name, rows in by_scenario(scored.rows).items()
            },
            "failures": scored.failures,
            "missing": scored.missing,
            "left_over": scored.left_over,
        }
    )
    scores = Scores(scored.folder, summary, scored.rows)
    if shard[1] > 1:
        return scores
    if against is not None and theirs is not None:
        try:
            scores = _compared(bench, scores, theirs, against)
        except UserError as error:
            scores.write()
            raise UserError(
                f"{error} The scores of {videos} are kept in {scores.folder}, without a comparison."
            ) from None
    scores.write()
    return scores


def _compared(bench: Benchmark, scores: Scores, theirs: _Scored, against: Path) -> Scores:
    """The scores with their comparison. Raises UserError if there can be none."""
    _check_some(theirs, against)
    comparison = compared(bench.compare, short_name(against), theirs.rows, [*scores.rows])
    # In their order, so that what is read there has the digest that is kept.
    write_rows(theirs.folder / "scores.jsonl", theirs.rows)
    return scores.with_comparison(
        comparison, theirs.folder, json_digest(theirs.rows), theirs.failures
    )


def _check_some(scored: _Scored, videos: Path) -> None:
    if scored.failures and not scored.rows:
        raise UserError(
            f"None of the {len(scored.failures)} clips in {videos} can be scored; the first: "
            f"{scored.failures[0]['reason']}"
        )


def _clips(bench: Benchmark, videos: Path) -> tuple[list[CaptionedClip], list[CaptionedClip]]:
    """The clips to score, and those that are left over. Raises UserError if there are none."""
    elsewhere = videos.is_dir() and not (videos / GENERATION).exists()
    if elsewhere and (own := bench.clips(videos)):
        return [CaptionedClip(path=p, prompt=about["caption"], **about) for p, about in own], []
    clips, others = clips_of(videos)
    if not clips:
        of = f" of the prompts that it was last generated for; {len(others)} are of others"
        raise UserError(
            f"{videos} holds no generated clips (an .mp4 and a .json each){of if others else ''}."
        )
    return clips, others


def _score(bench: Benchmark, videos: Path, out: Path | None, shard: tuple[int, int]) -> _Scored:
    scored_with = {"benchmark": f"{bench.name} {bench.version}", **bench.about()}
    results, missing = bench.results(videos)
    clips, others = ([], []) if results else _clips(bench, videos)
    out = out or claim_benchmark_folder(videos, bench.name)
    out.mkdir(parents=True, exist_ok=True)
    if results:
        return _Scored(out, [row | scored_with for row in results], [], missing, [])
    index, shards = shard
    table = out / ("scores.jsonl" if shards == 1 else f"scores-{index}-of-{shards}.jsonl")
    part = clips[index::shards]
    kept = _kept(bench, out, part, scored_with)
    if len(kept) < len(part):
        bench.load()  # Once, and before earlier scores are replaced.
    # Only this process writes this file. It begins with the rows that others wrote, in order.
    write_rows(table, kept.values())
    rows, failures = [], []
    with table.open("a", encoding="utf-8") as file:
        for place, clip in track(list(enumerate(part)), f"evaluate {videos.name}"):
            row = kept.get(place)
            if row is None:
                try:
                    score = bench.score(bench.read(clip.path), clip.caption)
                    row = _begun(bench, clip) | scored_with | _depends(bench, clip) | score
                except (ClipError, UserError) as error:
                    failed = {"prompt_id": clip.prompt_id, "k": clip.k, "reason": str(error)}
                    failures.append(failed)
                    continue
                file.write(row_line(row))
                file.flush()
            rows.append(row)
    left = [{"prompt_id": clip.prompt_id, "k": clip.k, "prompt": clip.prompt} for clip in others]
    return _Scored(out, rows, failures, _missing(bench, clips), left)


def _kept(
    bench: Benchmark, out: Path, part: Sequence[CaptionedClip], scored_with: dict[str, Any]
) -> dict[int, Row]:
    """The rows that need not be scored again, by their clips' places in the part.

    It prints how many clips are scored again.
    """
    by_digest: dict[str, list[Row]] = defaultdict(list)
    names = set()
    for row in earlier_rows(out):
        by_digest[str(row.get("clip"))].append(row)
        names.add(clip_key(row))
    kept: dict[int, Row] = {}
    again = []
    for place, clip in enumerate(part if names else ()):
        with suppress(OSError, UserError):  # What cannot be read is told of when it is scored.
            wanted = scored_with | _depends(bench, clip)
            same = (row for row in by_digest[wanted["clip"]] if row | wanted == row)
            if row := next(same, None):
                kept[place] = row | _begun(bench, clip)
                continue
        if clip.key in names:
            again.append(clip)
    if again:
        console.print(
            f"{count(len(again), 'clip')} scored again, the first is {again[0].prompt_id!r} "
            f"{again[0].k}: the video, its caption or the way of scoring is another than before.",
        )
    return kept


def _begun(bench: Benchmark, clip: CaptionedClip) -> Row:
    """What a row says of which clip it is."""
    return {
        "prompt_id": clip.prompt_id,
        "k": clip.k,
        "scenario": bench.scenario(clip.caption),
        "model_digest": clip.model_digest,
    }


def _depends(bench: Benchmark, clip: CaptionedClip) -> Row:
    """What a clip's score depends on beside what `Benchmark.about` says."""
    return {"clip": clip_digest(clip.path), "reader": READER} | bench.about_prompt(clip.caption)


def _missing(bench: Benchmark, clips: Sequence[CaptionedClip]) -> list[dict[str, Any]]:
    """List the benchmark's own prompts that have no clip, for every k that occurs."""
    captions: dict[int, set[str]] = defaultdict(set)
    for clip in clips:
        captions[clip.k].add(clip.caption)
    return [
        {"prompt_id": prompt.id, "k": k, "prompt": prompt.caption}
        for k, with_clip in sorted(captions.items())
        for prompt in bench.missing(with_clip)
    ]
