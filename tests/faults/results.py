"""What the campaign counts, what it shows at the end, and the faults that it keeps."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from faults.outcome import alike

KINDS = {
    "differing": ("differs", "missing", "too many"),
    "tracebacks": ("traceback", "after SIG"),
    "hangs": ("hang",),
}
"""How the words for a fault begin, by the column of the table in which it counts."""


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong.

    Attributes:
        part: "kills", "inputs" or "pairs".
        number: Of the case within its part; with the seed it gives the same case again.
        subject: The verb.
        what: The fault in one line.
        more: The command, and what it said.
        folder: Where the case is kept.
    """

    part: str
    number: int
    subject: str
    what: str
    more: str = ""
    folder: str = ""

    @property
    def kind(self) -> str:
        """A column of the table."""
        for kind, words in KINDS.items():
            if self.what.startswith(words):
                return kind
        return "other faults"

    @property
    def likeness(self) -> tuple[str, str, str]:
        return self.part, self.subject, alike(self.what)


@dataclass
class Results:
    """Counts and faults. They can be added up: each process of the campaign has its own."""

    cases: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    faults: list[Fault] = field(default_factory=list)

    def add(self, other: Results) -> None:
        self.cases += other.cases
        self.runs += other.runs
        self.faults += other.faults

    def figures(self) -> dict[str, Any]:
        """Everything as it stands in the campaign's file; alike faults are listed once."""
        distinct: dict[tuple[str, str, str], list[Fault]] = {}
        for fault in self.faults:
            distinct.setdefault(fault.likeness, []).append(fault)
        return {
            "cases": dict(self.cases),
            "runs": dict(self.runs),
            "faults": dict(Counter(fault.kind for fault in self.faults)),
            "distinct": [
                {"times": len(alike_ones), "numbers": [f.number for f in alike_ones]}
                | asdict(alike_ones[0])
                for alike_ones in distinct.values()
            ],
        }

    def save(self, path: Path) -> None:
        path.write_text(
            json.dumps(
                {
                    "cases": dict(self.cases),
                    "runs": dict(self.runs),
                    "faults": [asdict(fault) for fault in self.faults],
                },
                indent=1,
            )
        )

    @classmethod
    def load(cls, path: Path) -> Results:
        values = json.loads(path.read_text())
        faults = [Fault(**fault) for fault in values["faults"]]
        return cls(Counter(values["cases"]), Counter(values["runs"]), faults)


def table(results: Results) -> str:
    """Cases and faults of each verb, in columns."""
    parts, kinds = ("kills", "inputs", "pairs"), (*KINDS, "other faults")
    counts: dict[str, Counter[str]] = {}
    for name, number in results.runs.items():
        part, _, verb = name.partition(" ")
        counts.setdefault(verb, Counter())[part] += number
    # A case with several faults of a kind counts once in the kind's column.
    for verb, kind, *_ in {(f.subject, f.kind, f.part, f.number) for f in results.faults}:
        counts.setdefault(verb, Counter())[kind] += 1
    counts = dict(sorted(counts.items()))
    counts["all"] = sum(counts.values(), Counter())
    lines = [f"{'':20}" + "".join(f"{name:>13}" for name in (*parts, *kinds))]
    for verb, row in counts.items():
        lines.append(f"{verb:20}" + "".join(f"{row[name]:>13}" for name in (*parts, *kinds)))
    about = ", ".join(f"{number} {name}" for name, number in sorted(results.cases.items()))
    return "\n".join([f"cases: {about}", *lines])
