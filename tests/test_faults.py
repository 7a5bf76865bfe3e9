"""The campaign of faults sees faults, draws the same inputs again, and leaves no verb out."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from faults import child
from faults.__main__ import cases
from faults.ground import Ground
from faults.inputs import drawn
from faults.jobs import jobs
from faults.outcome import content, differences
from faults.results import Fault, Results, table
from videorepa import cli

GROUND = Ground(Path("/nowhere"), "http://127.0.0.1:1")


def divide(_: list[str]) -> int:
    return 1 // 0


@pytest.mark.parametrize(
    ("verb", "fault"),
    [
        (lambda _: 0, None),
        (lambda _: 3, "exit code 3"),
        (lambda _: 1, "exit code 1 without an error"),
        (divide, "traceback: outside the project: ZeroDivisionError"),
        (lambda _: time.sleep(60), "hang: "),
        (lambda _: bytearray(1 << 36) and 0, "traceback: outside the project: MemoryError"),
    ],
)
def test_how_a_verb_ends_is_seen(verb, fault: str | None, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(cli, "main", verb)
    ended = child.run([], tmp_path, tmp_path / "log", patience=2)
    assert (ended.fault or "").startswith(fault or "") and (ended.fault is None) == (fault is None)


def test_an_outcome_is_compared_file_by_file(tmp_path: Path) -> None:
    for name, more in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "same").write_text("1")
        (tmp_path / name / "other").write_text(more)
        (tmp_path / name / f"alone-{name}").write_text("1")
        (tmp_path / name / "log.jsonl").write_text(f'{{"step": 1, "memory_gb": "{more}"}}\n')
    found = differences(content(tmp_path / "a"), content(tmp_path / "b"))
    assert found == ["missing: alone-b", "too many: alone-a", "differs: other"]


def test_every_verb_that_writes_is_killed() -> None:
    assert {job.arguments[0] for job in jobs(GROUND)} == cli.VERBS.keys() - {"inspect"}


def test_an_input_can_be_drawn_again() -> None:
    ours, theirs, others = (
        [drawn(GROUND, seed, number, {}) for number in (4, 9, 14)] for seed in ("1", "1", "2")
    )
    assert ours == theirs != others


def test_the_order_of_cases_and_the_table() -> None:
    counts = {"FAULTS_KILLS": "2", "FAULTS_INPUTS": "1"}
    assert list(cases(counts)) == [("kills", 0), ("inputs", 0), ("kills", 1)]
    assert list(cases({"FAULTS_ONLY": "kills:7 pairs:0"})) == [("kills", 7), ("pairs", 0)]
    results = Results(faults=[Fault("kills", n, "scan", "differs: scan.json") for n in (1, 2)])
    results.runs["kills scan"] = 5
    assert table(results).splitlines()[2].split() == ["scan", "5", "0", "0", "2", "0", "0", "0"]
    assert results.figures()["distinct"][0]["times"] == 2
