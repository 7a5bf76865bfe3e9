"""Runs the campaign and prints what it found. Exits with 1 if anything was wrong.

`make test-faults` takes about ten minutes. These variables of the environment change that:

- FAULTS_KILLS, FAULTS_INPUTS, FAULTS_PAIRS: how many cases of each part; with none of them, as many
  as fit into FAULTS_MINUTES (10).
- SEED (1): another one gives other cases.
- FAULTS_ONLY: cases to repeat, such as `kills:17 inputs:3`.
- FAULTS_LANES: cases that run at once; by default as many as there are cores.
- FAULTS_OUT (build/faults): the folder for everything. Cases with a fault are kept in it, and
  faults.json has the figures.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.ground import Ground, lay, serve
from faults.inputs import Laid, drawn, feed
from faults.jobs import Job, jobs
from faults.kills import Undisturbed, kill, undisturbed
from faults.pairs import pair
from faults.results import Fault, Results, table

PARTS = {"kills": 3, "inputs": 3, "pairs": 1}
"""How many cases of each part go into a round when time decides."""

Case = tuple[str, int]


def cases(environment: dict[str, str]) -> Iterator[Case]:
    """The cases in their order, without an end if only time ends them."""
    if only := environment.get("FAULTS_ONLY"):
        for word in only.split():
            part, _, number = word.partition(":")
            yield part, int(number)
        return
    counts = {part: int(environment.get(f"FAULTS_{part.upper()}", 0)) for part in PARTS}
    if any(counts.values()):
        spread = [
            ((n + 0.5) / counts[part], part, n) for part in PARTS for n in range(counts[part])
        ]
        yield from ((part, number) for _, part, number in sorted(spread))
        return
    for turn in itertools.count():
        for part, share in PARTS.items():
            yield from ((part, turn * share + n) for n in range(share))


class Lane:
    """One process of the campaign, which runs every so-manieth case."""

    def __init__(self, ground: Ground, out: Path, seed: str, lane: int) -> None:
        self.ground, self.out, self.seed = ground, out, seed
        self.own = out / f"lane{lane}"
        self.jobs = jobs(ground)
        self.whole: dict[str, Undisturbed] = {}
        self.drawn: dict[tuple[int, int], list[Laid]] = {}

    def run(self, part: str, number: int) -> Results:
        folder = self.out / part / f"{number}"
        shutil.rmtree(folder, ignore_errors=True)
        if part == "inputs":
            laid = drawn(self.ground, self.seed, number, self.drawn)
            results = feed(self.ground, laid, folder, number)
        else:
            take: dict[str, Callable[..., Results]] = {"kills": kill, "pairs": pair}
            weights = [job.weight for job in self.jobs]
            chance = random.Random(f"{self.seed} {part} {number} job")
            job = chance.choices(self.jobs, weights)[0]
            results = take[part](job, self.undisturbed(job), folder, self.seed, number)
        if not results.faults:
            shutil.rmtree(folder)
        return results

    def undisturbed(self, job: Job) -> Undisturbed:
        if job.name not in self.whole:
            # As deep as the cases' folders, since pages hold relative paths.
            self.whole[job.name] = undisturbed(job, self.own / job.name / "here")
        return self.whole[job.name]


def say(fault: Fault, seed: str) -> None:
    print(
        f"\n{fault.part} {fault.number}, {fault.subject}: {fault.what}\n"
        f"  again: make test-faults SEED={seed} FAULTS_ONLY={fault.part}:{fault.number}\n"
        f"  kept:  {fault.folder}",
        flush=True,
    )


def run_lane(lane: Lane, todo: Iterator[Case], deadline: float, path: Path) -> None:
    results = Results()
    for part, number in todo:
        if time.monotonic() > deadline:
            break
        found = lane.run(part, number)
        for fault in found.faults:
            say(fault, lane.seed)
        results.add(found)
        results.save(path)
    results.save(path)


def main() -> int:
    environment = dict(os.environ)
    seed = environment.get("SEED") or "1"
    out = Path(environment.get("FAULTS_OUT") or "build/faults").resolve()
    lanes = int(environment.get("FAULTS_LANES") or os.cpu_count() or 1)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    began = time.monotonic()
    # Stopped, it still shows what it has found, and leaves no lane behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server, url = serve()
    (out / "ground").mkdir()
    ground = lay(out / "ground", url)
    counted = any(
        environment.get(f"FAULTS_{name}") for name in ("KILLS", "INPUTS", "PAIRS", "ONLY")
    )
    minutes = float("inf") if counted else float(environment.get("FAULTS_MINUTES") or 10)
    running = []
    for number in range(lanes):
        sys.stdout.flush()
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                mine = itertools.islice(cases(environment), number, None, lanes)
                lane = Lane(ground, out, seed, number)
                run_lane(lane, mine, began + 60 * minutes, out / f"lane{number}.json")
                code = 0
            except KeyboardInterrupt:
                pass
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                os._exit(code)
        running.append(pid)
    try:
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
    except KeyboardInterrupt:
        for pid in running:
            os.kill(pid, signal.SIGTERM)
        codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in running]
    server.terminate()
    results = Results()
    for path in sorted(out.glob("lane*.json")):
        results.add(Results.load(path))
    figures = {"seed": seed, "seconds": round(time.monotonic() - began), **results.figures()}
    (out / "faults.json").write_text(json.dumps(figures, indent=1, ensure_ascii=False))
    print(f"\n{table(results)}\n\nseed {seed}, {figures['seconds']} s; figures: {out}/faults.json")
    return int(bool(results.faults) or any(codes))


if __name__ == "__main__":
    sys.exit(main())
