"""Exports what a run has trained as files for plain diffusers, and checks that it loads them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import torch

from videorepa.artifacts.model import trained_digest
from videorepa.artifacts.run import Run
from videorepa.artifacts.scores import Scores
from videorepa.errors import UserError
from videorepa.exchange.lora import COMFYUI_FILE, LORA_FILE, Adapter, comfyui_names
from videorepa.exchange.model_card import model_card
from videorepa.exchange.stock import inputs, output, stock_output
from videorepa.recipe import Recipe
from videorepa.system.files import atomic_folder, read_text
from videorepa.system.progress import console
from videorepa.system.wording import count

CARD = "README.md"

Format = Literal["diffusers", "comfyui"]

TOLERANCE = 1e-5
"""Largest relative difference between our output and that of the reloaded export, in float32."""


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

    If the folder holds this very export already, nothing is done. Its model card tells.

    A run that trained all weights gives `out/transformer`, a diffusers folder of the stock class. A
    LoRA gives `out/pytorch_lora_weights.safetensors`, with its strength, alpha / rank, multiplied
    into the weights, so that every loader applies it correctly. Neither holds anything of the
    alignment. `out/README.md` is a model card.

    Before it returns, it loads the result with stock diffusers in a process of its own and compares
    the outputs.

    Args:
        run_folder: Folder of the run.
        out: The folder to write.
        dtype: Dtype of the written weights. bfloat16 rounds small updates away.
        format: "comfyui" writes a LoRA as `comfyui_lora.safetensors`, with ComfyUI's names.
        fuse: Fold a LoRA into the weights and write the whole transformer.
        scores: Folders that `evaluate` or `likelihood` wrote, for the model card; by default those
            in the run. Of these it leaves out scores of other models and steps, and says so.

    Returns:
        The transformer's folder, or the LoRA's file.

    Raises:
        UserError: The options do not fit the run, it has trained nothing, `scores` are of another
            model, or the outputs differ, in which case nothing is left at `out` and the message
            says by how much.
    """
    run = Run.open(run_folder)
    recipe = run.recipe
    _check_kind(recipe, format, fuse)
    whole = fuse or recipe.train.lora is None
    lora_file = COMFYUI_FILE if format == "comfyui" else LORA_FILE
    product = out / (recipe.backbone.part if whole else lora_file)

    def card(step: int) -> str:
        words = str(dtype).removeprefix("torch.")
        return model_card(run, recipe, step, product.name, words, _evaluations(run, step, scores))

    if product.exists() and _text(out / CARD) == card(run.trained_step):
        console.print(f"{out} holds this export already; nothing was done.")
        return product
    with atomic_folder(out) as staged:
        step = run.trained_step  # Read once, since the training may go on meanwhile.
        (staged / CARD).write_text(card(step), encoding="utf-8")
        _write(staged / product.name, run, step, dtype, fuse)
    return product


def _text(path: Path) -> str | None:
    try:
        return read_text(path)
    except (OSError, ValueError):
        return None


def _write(product: Path, run: Run, step: int, dtype: torch.dtype, fuse: bool) -> None:
    """Write the product, and check it."""
    recipe, checkpoint, device = run.recipe, run.trained(step), torch.device("cpu")
    backbone = recipe.backbone.load(("transformer",), device, torch.float32)
    arguments = inputs(backbone, recipe)
    plain = output(backbone.transformer, arguments)
    del backbone  # Two models need not be in memory at once.
    backbone = run.backbone(("transformer",), device, torch.float32, checkpoint)
    transformer = backbone.transformer
    ours = output(transformer, arguments)
    if torch.equal(ours, plain):
        raise UserError(
            "The trained model gives exactly the base model's output, so there is nothing to "
            "export. Nothing was written. Did the run train at all?"
        )
    del checkpoint
    if fuse:
        transformer.fuse_lora()
        transformer.unload_lora()
    adapter = None
    if not fuse and recipe.train.lora is not None:
        adapter = Adapter.of(transformer).to(dtype)
    if dtype != torch.float32:
        # The weights are rounded first, so that the written ones are compared.
        if adapter is not None:
            adapter.put_into(transformer)
        else:
            for parameter in transformer.parameters():
                parameter.data = parameter.data.to(dtype).float()
        ours = output(transformer, arguments)
    part, classes = backbone.part, (recipe.backbone.lora_pipeline, type(transformer).__name__)
    names: dict[str, str] = {}
    if adapter is None:
        transformer.to(dtype).save_pretrained(product)
    elif product.name == COMFYUI_FILE:
        names = comfyui_names(classes[1], adapter.layers)
        adapter.save_for_comfyui(product, names)
    else:
        adapter.save_for_diffusers(product)
    del backbone, transformer
    theirs = stock_output(product, classes, (recipe.backbone.source, part), names, arguments)
    error = ((theirs - ours).norm() / ours.norm()).item()
    if not error < TOLERANCE:
        raise UserError(
            "The export does not give the same output in stock diffusers: the relative "
            f"difference is {error:.2e}, and at most {TOLERANCE:.0e} is allowed. Nothing was "
            "written."
        )


def _check_kind(recipe: Recipe, format: Format, fuse: bool) -> None:
    if recipe.train.lora is None and (fuse or format == "comfyui"):
        what = "--fuse folds a LoRA in" if fuse else "the format comfyui is for a LoRA"
        raise UserError(f"The run trained all weights, and {what}. Export without it.")
    if format == "comfyui" and not recipe.backbone.is_in_comfyui:
        raise UserError(
            f"ComfyUI's own class of the model lacks layers that {recipe.backbone.weights} has, so "
            "it cannot load the model that the LoRA is for. Export in the format diffusers."
        )
    if fuse and format == "comfyui":
        raise UserError(
            "--fuse gives a whole transformer, and the format comfyui is for a LoRA. Leave one out."
        )


def _evaluations(run: Run, step: int, folders: Sequence[Path]) -> list[Scores]:
    """Read the scores of the run's model at a step: from these folders, or from those in the run.

    Raises:
        UserError: A folder is damaged, or has a comparison with scores that are others by now; or
            one that was asked for has scores of another model.
    """
    digest, evaluations = trained_digest(run, run.recipe.backbone, step), []
    in_run = sorted(path.parent for path in run.path.glob("**/summary.json"))
    for scores in map(Scores.read, folders or in_run):
        others = [row for row in scores.rows if row.get("model_digest") not in (digest, None)]
        if not others:
            scores.check_comparison()
            evaluations.append(scores)
            continue
        found = (
            f"{scores.folder} has {count(len(others), 'score')} of another model, or of another "
            f"step, than the exported one of step {step}"
        )
        if folders:
            raise UserError(
                f"{found}. Leave it out of --scores, or generate the clips and score them again."
            )
        console.print(f"{found}; the model card is without it.")
    return evaluations
