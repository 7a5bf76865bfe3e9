"""Hands out what a run has trained, as files that plain diffusers loads, checked by doing that."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.run import Run

LORA_FILE = "pytorch_lora_weights.safetensors"
INPUTS, ANSWER = "inputs.pt", "answer.safetensors"
TOLERANCE = 1e-5
"""Largest relative difference between our output and that of the reloaded export, in float32."""

# Runs in a process that knows nothing of videorepa: what a user of the export would write.
_STOCK = """
import sys
import diffusers, torch
from safetensors.torch import save_file
pipeline_class, model_class, product, base, part, inputs, answer = sys.argv[1:]
pipeline_class, model_class = getattr(diffusers, pipeline_class), getattr(diffusers, model_class)
if product.endswith(".safetensors"):
    transformer = model_class.from_pretrained(base, subfolder=part)
    weights, metadata = pipeline_class.lora_state_dict(product, return_lora_metadata=True)
    pipeline_class.load_lora_into_transformer(weights, transformer, metadata=metadata)
else:
    transformer = model_class.from_pretrained(product)
given = torch.load(inputs, weights_only=True)
with torch.no_grad():
    sample = transformer.to(torch.float32).eval()(**given, return_dict=False)[0]
save_file({"sample": sample.contiguous()}, answer)
assert "videorepa" not in sys.modules
"""


def export(run_folder: Path, out: Path, *, dtype: torch.dtype = torch.float32) -> Path:
    """Write what the run has trained into `out`, a folder that must not exist yet.

    All weights: `out/transformer`, a diffusers folder of the stock class. LoRA: a file
    `pytorch_lora_weights.safetensors` with rank and alpha in its metadata, so that stock diffusers
    applies it at the right strength. Nothing of the alignment is in either. Gives the folder or
    file. dtype: of the written weights; in bfloat16 small updates are lost to rounding.

    Before it says done it loads the result with stock diffusers in a process of its own and
    compares outputs; if they differ, nothing is left at `out` and UserError says by how much.
    """
    run = Run.open(run_folder)
    recipe = run.recipe
    if out.exists():
        raise UserError(f"{out} exists already. Choose another folder, or delete it.")
    out.parent.mkdir(parents=True, exist_ok=True)
    base = recipe.backbone.load(("transformer",), torch.device("cpu"), torch.float32)
    trained = run.backbone(("transformer",), torch.device("cpu"), torch.float32)
    with _scratch(out) as scratch:
        staged = scratch / "staged"
        staged.mkdir()
        if recipe.train.lora is None:
            product = staged / trained.part
            trained.transformer.to(dtype).save_pretrained(product)
            trained.transformer.to(torch.float32)
        else:
            product = staged / LORA_FILE
            _save_lora(trained.transformer, recipe.backbone.lora_pipeline, product, dtype)
        _write_card(staged, run, recipe)
        ours, unlike_base = _outputs(trained, base, recipe, scratch / INPUTS)
        theirs = _stock_output(product, trained, recipe, scratch)
        error = ((theirs - ours).norm() / ours.norm()).item()
        if not error < TOLERANCE:
            raise UserError(
                f"The export does not give the same output in stock diffusers: relative difference "
                f"{error:.2e}, at most {TOLERANCE:.0e} is right. Nothing was written to {out}."
            )
        if unlike_base == 0:
            raise UserError(
                "The trained model gives exactly the base model's output, so there is nothing to "
                f"hand out. Nothing was written to {out}. Did the run train at all?"
            )
        shutil.move(staged, out)
    return out / product.name


@contextmanager
def _scratch(out: Path) -> Iterator[Path]:
    """A folder beside `out` to work in. What a killed process has left there is removed."""
    folder = out.parent / f".tmp-export-{out.name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _save_lora(transformer: Any, pipeline: str, path: Path, dtype: torch.dtype) -> None:
    import diffusers
    from peft.utils import get_peft_model_state_dict

    state = {key: value.to(dtype) for key, value in get_peft_model_state_dict(transformer).items()}
    getattr(diffusers, pipeline).save_lora_weights(
        path.parent,
        transformer_lora_layers=state,
        transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict(),
    )


def _outputs(trained: Any, base: Any, recipe: Recipe, inputs: Path) -> tuple[torch.Tensor, float]:
    """Our output on fixed inputs, which are left in a file, and how far it is from the base's."""
    shapes = recipe.backbone.shapes(recipe.data)
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, *shapes.latents, generator=draw)
    text = {
        name: torch.randn(1, *like.shape, generator=draw)
        if like.is_floating_point()
        else torch.ones(1, *like.shape, dtype=like.dtype)
        for name, like in shapes.text.items()
    }
    given = trained.inputs(noisy, text, torch.tensor([500]))
    torch.save(given, inputs)
    with torch.no_grad():
        ours, plain = (
            model.transformer.eval()(**given, return_dict=False)[0] for model in (trained, base)
        )
    return ours, (ours - plain).abs().max().item()


def _stock_output(product: Path, trained: Any, recipe: Recipe, scratch: Path) -> torch.Tensor:
    classes = [recipe.backbone.lora_pipeline, type(trained.transformer).__name__]
    files = [product, recipe.backbone.source, trained.part, scratch / INPUTS, scratch / ANSWER]
    done = subprocess.run(
        [sys.executable, "-c", _STOCK, *classes, *files],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        last = "\n".join(done.stderr.strip().splitlines()[-3:])
        raise UserError(f"Stock diffusers cannot load the export:\n{last}")
    return load_file(scratch / ANSWER)["sample"]


def _alignment(recipe: Recipe) -> str:
    if recipe.alignment is None:
        return "none"
    align, encoder = recipe.alignment
    return f"{align.loss.name}, weight {align.weight}, block {align.block}, teacher {encoder.name}"


def _write_card(folder: Path, run: Run, recipe: Recipe) -> None:
    kind = "all weights" if recipe.train.lora is None else f"LoRA, rank {recipe.train.lora.rank}"
    lines = [
        f"# {recipe.name}",
        "",
        recipe.about or "Fine-tuned with videorepa.",
        "",
        f"- base model: {recipe.backbone.weights}",
        f"- trained: {kind}, step {run.trained().step} of {recipe.optim.steps}",
        f"- alignment: {_alignment(recipe)}",
        "",
        "The recipe, whole:",
        "",
        "```yaml",
        recipe.text().rstrip(),
        "```",
        "",
        "Made with:",
        "",
        "```json",
        json.dumps(json.loads((run.path / "environment.json").read_text()), indent=1),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
