"""Hands out what a run has trained, as files that plain diffusers loads, checked by doing that."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor

from videorepa.card import model_card
from videorepa.data.files import atomic_folder
from videorepa.errors import UserError
from videorepa.lora import COMFYUI_FILE, LORA_FILE, Adapter, comfyui_names
from videorepa.recipe import Recipe
from videorepa.report.inputs import read_scores
from videorepa.run import Run

Format = Literal["diffusers", "comfyui"]
TOLERANCE = 1e-5
"""Largest relative difference between our output and that of the reloaded export, in float32."""

# Runs in a process that knows nothing of videorepa: what a user of the export would write. ComfyUI
# itself is not at hand; what it does with a LoRA is, given which of diffusers' layers it names.
_STOCK = """
import json, sys
import diffusers, torch
from safetensors.torch import load_file, save_file
pipeline_class, model_class, product, base, part, names, inputs, answer = sys.argv[1:]
pipeline_class, model_class = getattr(diffusers, pipeline_class), getattr(diffusers, model_class)
if not product.endswith(".safetensors"):
    transformer = model_class.from_pretrained(product)
else:
    transformer = model_class.from_pretrained(base, subfolder=part)
    names = json.load(open(names))
    if names:
        lora = load_file(product)
        for layer, name in names.items():
            up, down, alpha = (
                lora.pop(f"diffusion_model.{name}.{part}").float()
                for part in ("lora_up.weight", "lora_down.weight", "alpha")
            )
            weight = transformer.get_submodule(layer).weight.data
            change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
            weight += alpha / down.shape[0] * change
        assert not lora, "weights without a layer"
    else:
        weights, metadata = pipeline_class.lora_state_dict(product, return_lora_metadata=True)
        pipeline_class.load_lora_into_transformer(weights, transformer, metadata=metadata)
given = torch.load(inputs, weights_only=True)
with torch.no_grad():
    sample = transformer.to(torch.float32).eval()(**given, return_dict=False)[0]
save_file({"sample": sample.contiguous()}, answer)
assert "videorepa" not in sys.modules
"""


def export(
    run_folder: Path,
    out: Path,
    *,
    dtype: torch.dtype = torch.float32,
    format: Format = "diffusers",
    fuse: bool = False,
    scores: Sequence[Path] = (),
) -> Path:
    """Write what the run has trained into `out`, a folder that must not exist yet.

    All weights: `out/transformer`, a diffusers folder of the stock class. LoRA: a file
    `pytorch_lora_weights.safetensors` with rank and alpha in its header, so that stock diffusers
    applies it at the right strength. Nothing of the alignment is in either. Gives the folder or
    file; `out/README.md` says what it is.

    dtype: of the written weights; in bfloat16 small updates are lost to rounding.
    format: "comfyui" writes a LoRA as `comfyui_lora.safetensors`, with ComfyUI's names.
    fuse: fold a LoRA into the weights and write the whole transformer.
    scores: folders that `evaluate` wrote, for the README; those in the run are found by themselves.

    Before it says done it loads the result with stock diffusers in a process of its own and
    compares outputs; if they differ, nothing is left at `out` and UserError says by how much.
    """
    run = Run.open(run_folder)
    recipe = run.recipe
    _check_kind(recipe, format, fuse)
    if out.exists():
        raise UserError(f"{out} exists already. Choose another folder, or delete it.")
    evaluations = [read_scores(folder) for folder in scores or _scores_in(run)]
    found, device = run.trained(), torch.device("cpu")
    backbone = recipe.backbone.load(("transformer",), device, torch.float32)
    given = _inputs(backbone, recipe)
    plain = _output(backbone.transformer, given)
    # Loaded anew, when the untouched one is gone: two models need not be in memory at once.
    del backbone
    backbone = run.backbone(("transformer",), device, torch.float32, found)
    transformer = backbone.transformer
    ours = _output(transformer, given)
    if torch.equal(ours, plain):
        raise UserError(
            "The trained model gives exactly the base model's output, so there is nothing to "
            f"hand out. Nothing was written to {out}. Did the run train at all?"
        )
    step, trained = found.step, set(found.trained)
    del found  # Most of it is the optimiser's.
    if fuse:
        transformer.fuse_lora()
        transformer.unload_lora()
    whole = fuse or recipe.train.lora is None
    if dtype != torch.float32:
        # Rounded first, so that what is compared is what is written.
        for name, parameter in transformer.named_parameters():
            if whole or name in trained:
                parameter.data = parameter.data.to(dtype).float()
        ours = _output(transformer, given)
    part, classes = backbone.part, (recipe.backbone.lora_pipeline, type(transformer).__name__)
    names: dict[str, str] = {}
    with atomic_folder(out) as staged:
        if whole:
            product = staged / part
            transformer.to(dtype).save_pretrained(product)
        elif format == "comfyui":
            product, adapter = staged / COMFYUI_FILE, Adapter.of(transformer).to(dtype)
            names = comfyui_names(classes[1], adapter.layers)
            adapter.save_for_comfyui(product, names)
        else:
            product = staged / LORA_FILE
            Adapter.of(transformer).to(dtype).save_for_diffusers(product)
        card = model_card(run, recipe, step, product.name, part, evaluations)
        (staged / "README.md").write_text(card, encoding="utf-8")
        del backbone, transformer
        theirs = _stock_output(product, classes, (recipe.backbone.source, part), names, given)
        error = ((theirs - ours).norm() / ours.norm()).item()
        if not error < TOLERANCE:
            raise UserError(
                f"The export does not give the same output in stock diffusers: relative difference "
                f"{error:.2e}, at most {TOLERANCE:.0e} is right. Nothing was written to {out}."
            )
    return out / product.name


def _check_kind(recipe: Recipe, format: Format, fuse: bool) -> None:
    if recipe.train.lora is None and (fuse or format == "comfyui"):
        what = "--fuse folds a LoRA in" if fuse else "the format comfyui is for a LoRA"
        raise UserError(f"The run trained all weights, and {what}. Export without it.")
    if fuse and format == "comfyui":
        raise UserError(
            "--fuse gives a whole transformer, and the format comfyui is for a LoRA. Leave one out."
        )


def _scores_in(run: Run) -> list[Path]:
    return sorted(path.parent for path in run.path.glob("**/scores/summary.json"))


def _inputs(backbone: Any, recipe: Recipe) -> dict[str, Any]:
    """Fixed arguments of the transformer."""
    shapes = recipe.backbone.shapes(recipe.data)
    draw = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, *shapes.latents, generator=draw)
    text = {
        name: torch.randn(1, *like.shape, generator=draw)
        if like.is_floating_point()
        else torch.ones(1, *like.shape, dtype=like.dtype)
        for name, like in shapes.text.items()
    }
    return backbone.inputs(noisy, text, torch.tensor([500]))


@torch.no_grad()
def _output(transformer: Any, given: dict[str, Any]) -> Tensor:
    return transformer.eval()(**given, return_dict=False)[0]


def _stock_output(
    product: Path,
    classes: tuple[str, str],
    base: tuple[str, str],
    names: dict[str, str],
    given: dict[str, Any],
) -> Tensor:
    """What the pipeline's and the transformer's stock classes make of the export.

    base: the base model's folder, and the transformer's in it. names: of the layers in a LoRA for
    ComfyUI, else empty. given: the transformer's arguments.
    """
    with tempfile.TemporaryDirectory() as scratch:
        paths = [Path(scratch) / name for name in ("names.json", "inputs", "answer")]
        paths[0].write_text(json.dumps(names))
        torch.save(given, paths[1])
        done = subprocess.run(
            [sys.executable, "-c", _STOCK, *classes, product, *base, *paths],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            last = "\n".join(done.stderr.strip().splitlines()[-3:])
            raise UserError(f"Stock diffusers cannot load the export:\n{last}")
        return load_file(paths[2])["sample"]
