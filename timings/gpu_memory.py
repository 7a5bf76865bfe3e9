"""The tables of docs/running.md that say what trainings take on a GPU, which need not be there.

    python timings/gpu_memory.py

`inspect` predicts them for one clip of 49 x 480 x 720 at a time, in bfloat16, with gradient
checkpointing.
"""

from __future__ import annotations

from pathlib import Path

from videorepa.inspect import inspect
from videorepa.recipe import Recipe
from videorepa.training.cost import Cost

RECIPES = Path(__file__).parents[1] / "recipes"
ONE_CLIP = ("optim.batch_size=1", "optim.accumulate=32")
LORA = "train.lora={rank: 128, alpha: 64}"
MODELS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {
    "CogVideoX-5B": ("videorepa-5b", (), ("float32", "bfloat16", "float8", "int8", "nf4")),
    "CogVideoX-2B": ("videorepa-2b", (LORA,), ("float32", "bfloat16")),
}


def cost(recipe: str, *changes: str) -> Cost:
    parsed = Recipe.from_yaml(RECIPES / f"{recipe}.yaml", (*ONE_CLIP, *changes))
    return inspect(parsed, device="cuda").cost


def size(number: int) -> str:
    return f"{number / 1e9:.1f}"


def main() -> None:
    columns = "frozen weights in | peak GB, `adamw` | `adamw8bit` | of that, weights | activations"
    print(f"| LoRA of rank 128 on | {columns} |\n|---|---|---|---|---|---|")
    for model, (recipe, changes, forms) in MODELS.items():
        for form in forms:
            held = (*changes, f"memory.frozen={form}")
            usual = cost(recipe, *held)
            less = cost(recipe, *held, "memory.optimizer=adamw8bit")
            sizes = usual.peak, less.peak, usual.parts["weights"], usual.parts["activations"]
            cells = [model, form, *map(size, sizes)]
            print(f"| {' | '.join(cells)} |", flush=True)
    print("\n| all weights of | peak GB, `adamw` | `adamw8bit` |\n|---|---|---|")
    usual = cost("videorepa-2b")
    less = cost("videorepa-2b", "memory.optimizer=adamw8bit")
    print(f"| CogVideoX-2B | {size(usual.peak)} | {size(less.peak)} |")


if __name__ == "__main__":
    main()
