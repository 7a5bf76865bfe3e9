"""Predicted against measured peak memory of trainings on the CPU, each in a process of its own.

    python timings/memory.py [--repeats 3]

The lab's micro model with batches of 12 clips, all weights and LoRA, in the ways that the recipe's
`memory` has; real_size.py does the same for published sizes. Measured is the process's largest
resident set, as Linux keeps it (VmHWM; ru_maxrss begins with what the parent process takes). glibc
keeps freed memory for later, up to a fifth of the whole. So each training is measured once with
glibc set to give memory back at once (MALLOC_MMAP_THRESHOLD_), which is what is predicted, and once
with its defaults.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from videorepa.recipe import Recipe

PEAK = """
status = dict(line.split(":") for line in open("/proc/self/status"))
print(int(status["VmHWM"].split()[0]) * 1024)
"""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
PREDICT = """
import json, sys
from videorepa.inspect import inspect
from videorepa.recipe import Recipe
cost = inspect(Recipe.from_yaml(sys.argv[1]), device="cpu").cost
print(json.dumps([cost.peak, cost.parts]))
"""
TRAIN = """
import sys
from pathlib import Path
from videorepa.recipe import Recipe
from videorepa.train import train
train(Recipe.from_yaml(sys.argv[1]), Path(sys.argv[2]), device="cpu")
"""
LORA = "train.lora={rank: 16, alpha: 16}"
SAVED = "memory.gradient_checkpointing=true"
CASES: dict[str, tuple[str, ...]] = {
    "all weights": (),
    "all weights, checkpointing": (SAVED,),
    "all weights, adamw8bit": ("memory.optimizer=adamw8bit",),
    "LoRA 16": (LORA,),
    "LoRA 16, checkpointing": (LORA, SAVED),
    "LoRA 16, bfloat16": (LORA, "memory.frozen=bfloat16"),
    "LoRA 16, float8, checkpointing": (LORA, SAVED, "memory.frozen=float8"),
    "LoRA 16, int8, checkpointing": (LORA, SAVED, "memory.frozen=int8"),
    "LoRA 16, nf4, checkpointing": (LORA, SAVED, "memory.frozen=nf4"),
}
NEEDS = {"adamw8bit": "bitsandbytes", "int8": "torchao", "nf4": "bitsandbytes"}


def micro_recipe(root: Path) -> Recipe:
    """The demo's recipe on a few simulated clips, for three steps."""
    import videorepa.lab

    demo = Recipe.from_yaml(Path(videorepa.lab.__file__).parent / "demo.yaml")
    lab = "data={lab: {clips: 24}, frames: 17, height: 64, width: 64, prepare_batch: 4, cache: %s}"
    return demo.override(lab % (root / "cache"), "optim.steps=3")


def run(*command: str, **environment: str) -> str:
    """The last line that a Python process prints."""
    code, *arguments = command
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        env=os.environ | environment,
    )
    return done.stdout.split(b"\n")[-2].decode()


def measured(recipe: Path, out: Path, **environment: str) -> int:
    """Peak bytes of a training."""
    return int(run(TRAIN + PEAK, str(recipe), str(out), **environment))


def compare(name: str, recipe: Recipe, root: Path, repeats: int) -> None:
    path = root / "recipe.yaml"
    recipe.to_yaml(path)
    # Predicted in a process of its own, whose size is a part of the prediction.
    peak, parts = json.loads(run(PREDICT, str(path)))
    runs = Path(tempfile.mkdtemp(dir=root))
    row = [f"{peak / 1e6:.0f}"]
    for environment in (GIVE_BACK, {}):
        peaks = [
            measured(path, runs / f"{len(environment)}-{n}", **environment) for n in range(repeats)
        ]
        mean = sum(peaks) / repeats
        spread = "" if repeats == 1 else f" ({min(peaks) / 1e6:.0f}-{max(peaks) / 1e6:.0f})"
        row += [f"{mean / 1e6:.0f}{spread}", f"{peak / mean:.2f}"]
    listed = " ".join(f"{part} {size / 1e6:.0f}" for part, size in parts.items())
    print(f"| {name} | {' | '.join(row)} | {listed} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    print("| training | predicted MB | measured MB | ratio | glibc's default MB | ratio | parts |")
    print("|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        from videorepa.prepare import prepare

        micro = micro_recipe(Path(folder))
        prepare(micro)
        for name, changes in CASES.items():
            needed = [package for word, package in NEEDS.items() if word in name]
            if all(importlib.util.find_spec(package) for package in needed):
                compare(name, micro.override(*changes), Path(folder), arguments.repeats)


if __name__ == "__main__":
    main()
