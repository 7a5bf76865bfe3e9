"""Predicted against measured peak memory of trainings on the CPU, each in a process of its own.

    python benchmarks/memory.py [--repeats 3] [--real-size FOLDER_WITH_clips.csv]

The lab's micro model with batches of 12 clips, all weights and LoRA, in the ways that the recipe's
`memory` has; and, where it is asked for, the full-size random model of real_size.py. Measured is
the process's largest resident set, as the system keeps it (ru_maxrss). `process` is that of one
which has imported everything and made nothing: the constant PROCESS of videorepa.memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from videorepa.lab import micro_weights
from videorepa.memory import predict
from videorepa.recipe import Recipe

PEAK = "import resource; print('peak', resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
IMPORTS = (
    "import videorepa.train, diffusers, peft; from diffusers import CogVideoXTransformer3DModel"
)
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


def measured(*command: str) -> int:
    """Peak bytes of a Python process."""
    code, *arguments = command
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{PEAK}", *arguments], check=True, capture_output=True
    )
    return int(done.stdout.split()[-1])


def compare(name: str, recipe: Recipe, root: Path, repeats: int) -> None:
    cost = predict(recipe, torch.device("cpu"))
    path = root / "recipe.yaml"
    recipe.to_yaml(path)
    runs = Path(tempfile.mkdtemp(dir=root))
    peaks = [measured(TRAIN, str(path), str(runs / str(n))) / 1e6 for n in range(repeats)]
    mean = sum(peaks) / repeats
    parts = " ".join(f"{part} {size / 1e6:.0f}" for part, size in cost.parts.items())
    print(
        f"| {name} | {cost.peak / 1e6:.0f} | {mean:.0f} ({min(peaks):.0f}-{max(peaks):.0f}) | "
        f"{cost.peak / 1e6 / mean:.2f} | {parts} |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--real-size", type=Path, metavar="CLIPS")
    arguments = parser.parse_args()
    micro_weights("cogvideox")  # There, before anything is measured.
    empty = [measured(IMPORTS) / 1e6 for _ in range(arguments.repeats)]
    print(f"process: {min(empty):.0f}-{max(empty):.0f} MB\n")
    print("| training | predicted MB | measured MB | ratio | parts |\n|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if arguments.real_size:
            import real_size

            real_size.build(root)
            recipe = real_size.recipe(root, arguments.real_size.resolve())
            subprocess.run(
                [sys.executable, real_size.__file__, "--clips", str(arguments.real_size)]
                + ["--part", "prepare", str(root)],
                check=True,
            )
            name = "CogVideoX-2B's size, LoRA 128, bfloat16"
            compare(f"{name}, checkpointing", recipe.override(SAVED), root, 1)
            compare(name, recipe, root, 1)
            return
        from videorepa.prepare import prepare

        micro = micro_recipe(root)
        prepare(micro)
        for name, changes in CASES.items():
            wanted = [package for word, package in NEEDS.items() if word in name]
            if all(importlib.util.find_spec(package) for package in wanted):
                compare(name, micro.override(*changes), root, arguments.repeats)


if __name__ == "__main__":
    main()
