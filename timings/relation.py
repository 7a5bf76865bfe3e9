"""Token Relation Distillation beside the published formula: time, memory, and the floor of both.

    OMP_NUM_THREADS=1 python timings/relation.py

Forward and backward in float32 at the published size, 24 x 10 x 15 tokens of width 768, by
videorepa and by the formula as published (normalise, two products, all pairs at once, autograd).
The two take turns in one process, since other work on the machine slows both; besides the time by
the clock there is the time on the processor, which waiting does not count towards. Memory is what
the resident set grows by at its peak, in a fresh process for each number, whose allocator is told
to return what is freed. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn import functional as F

from videorepa.align.projector import Projector
from videorepa.losses.relation import Relation
from videorepa.tokens import TokenGrid

STEPS, HEIGHT, WIDTH, CHANNELS = 24, 10, 15, 768
MARGIN = 0.1


def published(student: TokenGrid, teacher: TokenGrid) -> torch.Tensor:
    ours = F.normalize(student.tokens.flatten(1, 3), dim=-1)
    theirs = F.normalize(teacher.tokens.flatten(1, 3), dim=-1)
    difference = torch.bmm(ours, ours.mT) - torch.bmm(theirs, theirs.mT)
    return (difference.abs() - MARGIN).relu().mean()


WAYS: dict[str, Callable[[TokenGrid, TokenGrid], torch.Tensor]] = {
    "published formula": published,
    "videorepa": Relation(margin=MARGIN),
}


class LossAlone:
    """The loss on random tokens, and the gradient with respect to the student's."""

    def __init__(self, clips: int, steps: int) -> None:
        torch.manual_seed(0)
        size = (clips, steps, HEIGHT, WIDTH, CHANNELS)
        # Real features have a common mean. With one, similarities lie on both sides of the margin.
        self.student = (torch.randn(size) + 0.3).requires_grad_()
        self.teacher = TokenGrid(torch.randn(size) + 0.5, start=1, stride=2)

    def run(self, way: str) -> float:
        self.student.grad = None
        loss = WAYS[way](TokenGrid(self.student, start=1, stride=2), self.teacher)
        loss.backward()
        return loss.item()


class WholePath:
    """From a CogVideoX-2B block's output through the projector to the loss, and back."""

    def __init__(self, clips: int, steps: int) -> None:
        torch.manual_seed(0)
        self.student = torch.randn(clips, steps // 2 + 1, 30, 45, 1920, requires_grad=True)
        size = (clips, steps, HEIGHT, WIDTH, CHANNELS)
        self.teacher = TokenGrid(torch.randn(size) + 0.5, start=1, stride=2)
        self.projector = Projector(1920, CHANNELS)

    def run(self, way: str) -> float:
        self.student.grad = None
        self.projector.zero_grad()
        student = self.projector(TokenGrid(self.student, start=-3, stride=4), self.teacher)
        loss = WAYS[way](student, self.teacher)
        loss.backward()
        return loss.item()


PARTS = {"loss": LossAlone, "path": WholePath}


def product_rate() -> float:
    """Floating-point operations a second on the processor, in products of the size of a tile."""
    a, out = torch.randn(600, CHANNELS), torch.empty(600, 600)
    start = time.process_time()
    for _ in range(20):
        torch.mm(a, a.mT, out=out)
    return 20 * 2 * 600 * 600 * CHANNELS / (time.process_time() - start)


def spread(values: list[float]) -> str:
    return f"{min(values):.2f} / {statistics.median(values):.2f} / {max(values):.2f}"


def compare_time(part: str, clips: int, repeats: int) -> None:
    work = PARTS[part](clips, STEPS)
    clock: dict[str, list[float]] = {way: [] for way in WAYS}
    processor: dict[str, list[float]] = {way: [] for way in WAYS}
    rates = []
    for _ in range(repeats):
        rates.append(product_rate())
        values = []
        for way in WAYS:
            starts = time.perf_counter(), time.process_time()
            values.append(work.run(way))
            clock[way].append(time.perf_counter() - starts[0])
            processor[way].append(time.process_time() - starts[1])
        torch.testing.assert_close(*values, rtol=1e-5, atol=0)
    print(f"\n{part}, {clips} clip(s): seconds, min / median / max of {repeats}")
    for way in WAYS:
        print(f"  {way:18} {spread(clock[way])}   on the processor {spread(processor[way])}")
    by_clock, by_processor = (
        min(seconds["published formula"]) / min(seconds["videorepa"])
        for seconds in (clock, processor)
    )
    print(f"  minima: {by_clock:.2f} times faster, on the processor {by_processor:.2f} times")
    if part == "loss":
        operations = 4 * (STEPS * HEIGHT * WIDTH) ** 2 * CHANNELS * clips
        floor = operations / max(rates)
        print(
            f"  floor: {operations / 1e9:.0f} G operations at {max(rates) / 1e9:.0f} G a second "
            f"are {floor:.2f} s, and twice that for the published formula; on the processor "
            f"videorepa takes {min(processor['videorepa']) / floor:.2f} times its floor, the "
            f"formula {min(processor['published formula']) / (2 * floor):.2f} times its own"
        )


def resident(name: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024 / 1e6
    raise RuntimeError(f"/proc/self/status has no {name}.")


def print_memory(part: str, way: str, clips: int, steps: int) -> None:
    """Print how many MB this process grows by, for the process that started it."""
    # The first use, at a small size, loads what libraries then keep.
    PARTS[part](1, 2).run(way)
    work = PARTS[part](clips, steps)
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    work.run(way)
    print(resident("VmHWM") - before)


def memory(part: str, way: str, clips: int, steps: int) -> float:
    command = [sys.executable, __file__, "--memory", part, way, str(clips), str(steps)]
    # glibc then maps every tensor on its own, so a freed one leaves the resident set at once.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(done.stdout)


def compare_memory(part: str, clips: int, steps: int) -> None:
    formula, ours = (memory(part, way, clips, steps) for way in WAYS)
    print(
        f"  {part}, {clips} clip(s) of {steps * HEIGHT * WIDTH:,} tokens: published formula "
        f"{formula:,.0f}, videorepa {ours:,.0f}; {formula / ours:.1f} times less"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7, help="of each timing of the loss")
    parser.add_argument("--memory", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.memory:
        part, way, clips, steps = arguments.memory
        print_memory(part, way, int(clips), int(steps))
        return
    print(f"{torch.get_num_threads()} thread(s), torch {torch.__version__}")
    compare_time("loss", 1, arguments.repeats)
    compare_time("loss", 4, arguments.repeats)
    compare_time("path", 1, max(1, arguments.repeats // 2))
    print("\npeak memory beyond the inputs, MB")
    compare_memory("loss", 1, STEPS)
    compare_memory("loss", 4, STEPS)
    compare_memory("path", 1, STEPS)
    for times in (2, 4):
        tokens = times * STEPS * HEIGHT * WIDTH
        grown = memory("loss", "videorepa", 1, times * STEPS)
        print(f"  loss, 1 clip of {tokens:,} tokens: videorepa {grown:,.0f}")


if __name__ == "__main__":
    main()
