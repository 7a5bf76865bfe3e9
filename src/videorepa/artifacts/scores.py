"""Writes and reads the scores of clips in a folder.

`scores.jsonl` has a row per clip, and `summary.json` the metrics over all of them. If the scores
were compared with another model's, `comparison.json` has the paired differences.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from videorepa.artifacts.clips import CaptionedClip, Key, clip_digest
from videorepa.artifacts.reading import json_lines, leaves, read_record
from videorepa.errors import UserError
from videorepa.system.files import atomic_write, parse_json, read_bytes, read_text
from videorepa.system.fingerprint import json_digest
from videorepa.system.lock import lock_beside, locked
from videorepa.system.progress import console
from videorepa.system.wording import count

Row = dict[str, Any]
"""One clip's score, with at least "prompt_id", "k" and "scenario".

Rows of `evaluate` also have "clip", the digest of the video, and "caption", what the clip was
scored against."""

Better = Literal["higher", "lower"]
"""Which way a score is better."""

OWNER = "benchmark"
"""The file in `scores` that names the benchmark whose scores it keeps."""

PASSED = "_passed"
"""What the names of checks end in, beside flags that are metrics or settings themselves."""


class _OpenModel(BaseModel):
    """A model that keeps further keys, which a benchmark may add."""

    model_config = ConfigDict(extra="allow")


class Metric(_OpenModel):
    """A metric over clips: a share in percent, or a mean.

    Attributes:
        percent: The share, 0 to 100; None if no clip has a valid value.
        mean: The mean; None if no clip has a valid value.
        n: Number of valid values.
        prompts: Number of different captions that they are of, if it is recorded.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        invalid: Number of clips whose value could not be told.
        headline: Whether the printed table has it, as it has all shares.
        fractions: Whether it is in percent, and a row's value is a fraction of 1.
    """

    percent: float | None = None
    mean: float | None = None
    n: int | None = None
    prompts: int | None = None
    low: float | None = None
    high: float | None = None
    invalid: int = 0
    headline: bool = False
    fractions: bool = False

    @property
    def is_share(self) -> bool:
        return "percent" in self.model_fields_set


class Failure(BaseModel):
    """A clip that could not be scored."""

    prompt_id: str
    k: int
    reason: str


class Summary(_OpenModel):
    """A benchmark's metrics over clips.

    Attributes:
        version: The benchmark's version; scores of different versions cannot be compared.
        asked: What was asked apart from the version, such as a judge or a setting; None if it is
            not recorded. Scores in which it differs cannot be compared.
        about: A sentence on the metrics, if the benchmark has one.
        notes: What else to know of these clips' scores.
        n: The number of clips with a score.
        by_scenario: The metrics of each scenario's clips.
        missing: The benchmark's prompts that have no clip.
        left_over: Clips that are not counted, since their prompts are no longer generated.
        rows: A digest of the rows that it is of, if it is recorded.
    """

    benchmark: str
    version: str
    asked: dict[str, Any] | None = None
    about: str | None = None
    notes: list[str] = []
    n: int
    metrics: dict[str, Metric]
    by_scenario: dict[str, dict[str, Metric]] = {}
    failures: list[Failure] = []
    missing: list[dict[str, Any]] = []
    left_over: list[dict[str, Any]] = []
    rows: str | None = None

    @property
    def says(self) -> list[str]:
        """Sentences to read with the metrics."""
        return [*([self.about] if self.about else []), *self.notes]

    @property
    def asked_by_name(self) -> dict[str, Any]:
        """The innermost values of `asked` by names for readers, such as "judge dtype"."""
        return {name.replace(".", " "): value for name, value in leaves(self.asked or {})}


class MetricDifference(_OpenModel):
    """A paired difference to another model.

    Attributes:
        difference: In the metric's own unit; for a share, in percentage points.
        low: Lower end of the 95 % interval.
        high: Upper end of it.
        p: p-value of the difference by itself, if it is tested.
        p_holm: p-value adjusted for all differences of the comparison.
        n: Number of pairs.
        prompts: Number of different captions that they are of, if a caption may have several pairs.
    """

    difference: float
    low: float
    high: float
    p: float | None = None
    p_holm: float | None = None
    n: int | None = None
    prompts: int | None = None

    @property
    def has_interval(self) -> bool:
        """Whether the interval has a width; it has none if all pairs differ by the same."""
        return self.low < self.high

    @property
    def independent(self) -> int | None:
        """The number of independent pairs, if it is recorded."""
        return self.n if self.prompts is None else self.prompts


class Comparison(_OpenModel):
    """Paired differences to another model.

    Attributes:
        against: The name of the other model's clips.
        unpaired: The number of rows without a partner.
        failures: The other model's clips that could not be scored.
        by_scenario: The differences over each scenario's clips.
        rows: A digest of this model's rows that it is of, if it is recorded.
        against_path: Where the other model's scores lie, or its clips where only those are
            compared; relative to the folder of these scores.
        against_rows: A digest of the other model's rows.
    """

    against: str
    unpaired: int = 0
    failures: list[Failure] = []
    metrics: dict[str, MetricDifference]
    by_scenario: dict[str, dict[str, MetricDifference]] = {}
    rows: str | None = None
    against_path: str | None = None
    against_rows: str | None = None

    @property
    def tested(self) -> list[MetricDifference]:
        """All differences that have a p-value."""
        families = (self.metrics, *self.by_scenario.values())
        return [one for family in families for one in family.values() if one.p is not None]


@dataclass(frozen=True)
class Scores:
    """The scores of one model's clips on one benchmark.

    Attributes:
        folder: Where they are kept.
        summary: The metrics over all clips.
        rows: The table's rows. Blind ratings have several per clip.
        comparison: The differences to another model, if they were computed.
    """

    folder: Path
    summary: Summary
    rows: Sequence[Row]
    comparison: Comparison | None = None

    @classmethod
    def read(cls, folder: Path) -> Scores:
        """Read a score folder. Raises UserError if a file is missing or damaged."""
        table = folder / "scores.jsonl"
        if not table.is_file() or not (folder / "summary.json").is_file():
            raise UserError(
                f"{folder} is not a score folder. Expected scores.jsonl and summary.json in it; "
                "`videorepa evaluate` writes them."
            )
        rows, paths = scored_rows(folder), (folder / "summary.json", folder / "comparison.json")
        summary = read_record(Summary, paths[0])
        comparison = read_record(Comparison, paths[1]) if paths[1].is_file() else None
        for record, path in zip((summary, comparison), paths, strict=True):
            if record is not None and record.rows not in (None, json_digest(rows)):
                raise UserError(
                    f"{path} is of other rows than those in {table}. Run `videorepa evaluate` "
                    "again, as it was run last."
                )
        return cls(folder, summary, rows, comparison)

    def write(self) -> None:
        """Write the folder's files, each whole or not at all.

        Without a comparison, an earlier one stays if it is of the same rows.
        """
        write_rows(self.folder / "scores.jsonl", self.rows)
        if self.comparison is None:
            self._drop_comparison()
        for record, name in ((self.summary, "summary"), (self.comparison, "comparison")):
            if record is not None:
                values = record.model_dump(exclude_unset=True) | {"rows": self.digest}
                atomic_write(self.folder / f"{name}.json", json.dumps(values, indent=1))

    @cached_property
    def digest(self) -> str:
        """A digest of the rows."""
        return json_digest(self.rows)

    def with_comparison(
        self,
        comparison: Comparison,
        theirs: Path,
        rows: str | None = None,
        failures: Sequence[dict[str, Any]] = (),
    ) -> Scores:
        """These scores with a comparison, which tells what it was made from.

        Args:
            comparison: The differences to the other model.
            theirs: Folder of the other model's scores, or its clips if it has no scores.
            rows: The digest of those scores' rows.
            failures: Its clips that could not be scored, each with its reason.
        """
        path = os.path.relpath(theirs.resolve(), self.folder.resolve())
        told: dict[str, Any] = {"against_path": Path(path).as_posix(), "against_rows": rows}
        if failures:
            told["failures"] = [Failure.model_validate(failure) for failure in failures]
        return replace(self, comparison=comparison.model_copy(update=told))

    @property
    def against(self) -> Path | None:
        """Where the scores or clips lie that these were compared with, if it is recorded."""
        path = self.comparison.against_path if self.comparison else None
        return None if path is None else (self.folder.resolve() / path).resolve()

    def check_comparison(self) -> None:
        """Check that the other model's scores are still those that these were compared with.

        Nothing can be told where they have been moved or removed.

        Raises:
            UserError: They are others by now, or an earlier version has not kept where they are.
        """
        if self.comparison is None or self.comparison.against_rows is None:
            return
        again = "Make it again; `videorepa evaluate` does with --against."
        if self.against is None:
            raise UserError(
                f"{self.folder} has a comparison by an earlier version, which does not tell where "
                f"the scores of {self.comparison.against} are. {again}"
            )
        is_there = (self.against / "scores.jsonl").is_file()
        if is_there and json_digest(scored_rows(self.against)) != self.comparison.against_rows:
            raise UserError(
                f"{self.folder} has a comparison with scores that {self.against} no longer has. "
                f"{again}"
            )

    def _drop_comparison(self) -> None:
        """Remove an earlier comparison if it is of other rows."""
        path = self.folder / "comparison.json"
        if not path.exists():
            return
        with suppress(UserError):
            if read_record(Comparison, path).rows == self.digest:
                return
        path.unlink()
        console.print(f"{path} was of other scores and is removed; --against makes it anew.")

    @cached_property
    def by_clip(self) -> dict[Key, Row]:
        return {clip_key(row): row for row in self.rows}

    def check(self, clips: Mapping[Key, CaptionedClip]) -> None:
        """Check that the rows are of these clips.

        Raises:
            UserError: A clip is gone, or it or its caption has changed since it was scored.
        """
        stale = []
        for row in self.rows:
            clip = clips.get(clip_key(row))
            scored = {key: row[key] for key in ("clip", "caption") if key in row}
            now = {"clip": clip_digest(clip.path), "caption": clip.caption} if clip else {}
            if scored and now | scored != now:
                stale.append(f"{row['prompt_id']!r} {row['k']}")
        if stale:
            raise UserError(
                f"{self.folder} holds {count(len(stale), 'score')} of clips that are gone or "
                f"whose video or caption has changed since; the first is of {stale[0]}. Run "
                "`videorepa evaluate` again."
            )

    @property
    def failures(self) -> dict[Key, str]:
        """The reason by clip that could not be scored."""
        return {(item.prompt_id, item.k): item.reason for item in self.summary.failures}


def score_folder(videos: Path, name: str = "scores") -> Path:
    """Give the folder for scores of clips: in the clips' folder, or beside their list."""
    return videos.with_suffix(f".{name}") if videos.is_file() else videos / name


def claim_benchmark_folder(videos: Path, benchmark: str) -> Path:
    """Give a benchmark's folder for scores: `scores`, or `scores-BENCHMARK` beside another's.

    So a second benchmark replaces no row of the first, also where both start together. Raises
    OSError.
    """
    first = score_folder(videos)
    first.mkdir(parents=True, exist_ok=True)
    owner = first / OWNER
    with locked(lock_beside(owner), first, wait=True):
        owners = {str(row.get("benchmark")).split(" ")[0] for row in earlier_rows(first)}
        owners |= {read_text(owner)} if owner.exists() else set()
        if owners - {benchmark}:
            return score_folder(videos, f"scores-{benchmark}")
        atomic_write(owner, benchmark)
    return first


def score_folders(videos: Path) -> list[Path]:
    """Find all score folders of a folder or a list of clips."""
    if not videos.is_file():
        return [path.parent for path in sorted(videos.glob("*/summary.json"))]
    beside = sorted(videos.parent.glob("*/summary.json"))
    return [path.parent for path in beside if path.parent.stem == videos.stem]


def failing_checks(row: Row) -> list[str]:
    """Name the checks that are False, such as "gravity" for `gravity_passed`."""
    return [
        name.rpartition(".")[2].removesuffix(PASSED).replace("_", " ")
        for name, value in leaves(row)
        if value is False and name.endswith(PASSED)
    ]


def clip_key(row: Row) -> Key:
    """Name the clip that a row is about."""
    return row["prompt_id"], row["k"]


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    atomic_write(path, "".join(map(row_line, rows)))


def scored_rows(folder: Path) -> list[Row]:
    """Read the rows of a score folder. Raises UserError if one is damaged."""
    table = folder / "scores.jsonl"
    rows = json_lines(table)
    for row in rows:
        try:
            _checked(row)
        except ValueError as error:
            raise UserError(
                f"{table} has a damaged row: {error}: {str(row)[:80]}. Run `videorepa evaluate` "
                "again, which scores such clips again."
            ) from None
    return rows


def row_line(row: Row) -> str:
    """Write a row as a line, with a digest by which a damaged one is noticed."""
    return json.dumps(row | {"digest": json_digest(row)}) + "\n"


def _checked(row: Row) -> Row:
    """Take a row's digest off. Raises ValueError if it is another row's."""
    digest = row.pop("digest", None)
    if digest is not None and digest != json_digest(row):
        raise ValueError("its values are not those that were written")
    if not (isinstance(row.get("prompt_id"), str) and isinstance(row.get("k"), int)):
        raise ValueError('it has no "prompt_id" and "k"')
    return row


def earlier_rows(folder: Path) -> Iterator[Row]:
    """Read the rows that this process and others have written so far.

    A process that was killed can leave half a line. It is left out, as every damaged row, and its
    clip is scored again.
    """
    for path in sorted(folder.glob("scores*.jsonl")):
        for line in read_bytes(path).splitlines():
            with suppress(ValueError):
                row = parse_json(line)
                if isinstance(row, dict):
                    yield _checked(row)
