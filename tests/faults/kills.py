"""A signal at a random moment, then the same command again: the outcome is the undisturbed one."""

from __future__ import annotations

import random
import signal
from dataclasses import dataclass
from pathlib import Path

from faults.child import PATIENCE_WITH_PROCESSES as PATIENCE
from faults.child import TRACEBACK, Child, Ended, run
from faults.jobs import Job
from faults.outcome import content, differences, grow_old
from faults.results import Fault, Results

SIGTERM_SHARE = 0.25
STOPPED = (-signal.SIGKILL, -signal.SIGTERM, 128 + signal.SIGTERM, 130)
"""How a process ends that a signal stopped, whether or not it had a last word."""


@dataclass(frozen=True)
class Undisturbed:
    """What a job leaves when nothing disturbs it, and how many seconds it takes."""

    content: dict[str, str]
    seconds: float


def undisturbed(job: Job, folder: Path) -> Undisturbed:
    folder.mkdir(parents=True)
    ended = run(job.arguments, folder, folder.with_suffix(".log"), PATIENCE)
    if ended.code:
        raise SystemExit(f"{job.name} fails when nothing disturbs it:\n{ended.said}")
    return Undisturbed(content(folder), ended.seconds)


def kill(job: Job, whole: Undisturbed, folder: Path, seed: str, number: int) -> Results:
    """Stop a job once to three times, let it end, and compare."""
    chance, results, story = random.Random(f"{seed} kills {number}"), Results(), []
    out, results.cases["kills"] = folder / "here", 1
    out.mkdir(parents=True)

    def fault(what: str, ended: Ended | None = None) -> None:
        said = ended.said[-3000:] if ended else ""
        more = "\n".join([f"videorepa {' '.join(job.arguments)}", *story, said])
        results.faults.append(Fault("kills", number, job.name, what, more, str(folder)))

    for attempt in range(chance.randint(1, 3)):
        how = signal.SIGTERM if chance.random() < SIGTERM_SHARE else signal.SIGKILL
        after = chance.uniform(0, whole.seconds)
        child = Child(job.arguments, out, folder / f"kill{attempt}", PATIENCE)
        ended = child.stop(after, how)
        story.append(f"{how.name} after {after:.3f} s: exit code {ended.code}")
        if ended.hung:
            fault(f"hang: {ended.fault}", ended)
            return results
        if TRACEBACK in ended.said:
            fault(f"after {how.name}: {ended.fault}", ended)
        if ended.code == 0:
            break  # It was over before the signal came.
        if ended.code not in STOPPED:
            fault(f"exit code {ended.code} after {how.name}", ended)
            return results
        results.runs[f"kills {job.name}"] += 1
        grow_old(out)
    else:
        ended = run(job.arguments, out, folder / "last", PATIENCE)
        if ended.fault or ended.code:
            fault(f"goes not on: {ended.fault or ended.said.strip()[-200:]}", ended)
            return results
    for words in differences(content(out), whole.content):
        fault(words)
    return results
