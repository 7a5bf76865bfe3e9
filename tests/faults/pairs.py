"""Two processes on one folder: each ends well or says who holds it, and the outcome is one's."""

from __future__ import annotations

import random
import re
import time
from pathlib import Path

from faults.child import PATIENCE_WITH_PROCESSES as PATIENCE
from faults.child import Child
from faults.jobs import Job
from faults.kills import Undisturbed
from faults.outcome import content, differences, grow_old
from faults.results import Fault, Results

SAYS_WHO = re.compile(
    r"another process|process \d+|\bheld by\b|is (being written|in use|working)|exists already"
)
"""The last is right where the other process has finished."""


def pair(job: Job, whole: Undisturbed, folder: Path, seed: str, number: int) -> Results:
    """Start a job twice, the second a little later, and compare what they leave together."""
    chance, results = random.Random(f"{seed} pairs {number}"), Results()
    out, results.cases["pairs"] = folder / "here", 1
    out.mkdir(parents=True)
    later = chance.choice([0.0, chance.uniform(0, 0.2), chance.uniform(0, 0.9)]) * whole.seconds
    first = Child(job.arguments, out, folder / "first", PATIENCE)
    time.sleep(later)
    second = Child(job.arguments, out, folder / "second", PATIENCE)
    while first.poll() is None or second.poll() is None:
        time.sleep(0.005)
    ends = (first.wait(), second.wait())
    results.runs[f"pairs {job.name}"] += 1

    def fault(what: str, said: str = "") -> None:
        more = (
            f"videorepa {' '.join(job.arguments)}\nthe second {later:.3f} s later\n{said[-3000:]}"
        )
        results.faults.append(Fault("pairs", number, job.name, what, more, str(folder)))

    for ended in ends:
        if ended.fault:
            fault(ended.fault, ended.said)
        elif ended.code and not SAYS_WHO.search(ended.said):
            fault(f"does not say who holds the folder: {ended.said.strip()[-160:]}", ended.said)
    if all(ended.code for ended in ends):
        fault("neither has finished", ends[1].said)
        return results
    grow_old(out)
    for words in differences(content(out), whole.content):
        fault(words)
    return results
