"""Exports a transformer with changed weights, and compares what stock diffusers makes of it."""

from __future__ import annotations

from pathlib import Path

import torch

from videorepa.exchange.lora import LORA_FILE, Adapter
from videorepa.exchange.stock import inputs, output, stock_output
from videorepa.recipe import Recipe
from videorepa.settings.sections import ClipSize
from videorepa.system.files import scratch_folder
from videorepa.verifying.record import Verification

EQUAL = 1e-5
"""The relative difference that counts as equal, in float32."""


def check_export(record: Verification, recipe: Recipe, size: ClipSize, beside: Path) -> None:
    """Reload an export of what the recipe trains, with drawn changes, in a process of its own.

    Args:
      record: Gets the check.
      recipe: Says whether a LoRA or all weights are trained.
      size: The size of the clip to compare on.
      beside: A file beside which the export is written for a while.
    """
    small = recipe.model_copy(update={"data": recipe.data.model_copy(update=size.model_dump())})
    spec, draw = recipe.backbone, torch.Generator().manual_seed(9)
    backbone = spec.load(("transformer",), torch.device("cpu"), torch.float32)
    transformer = backbone.transformer
    arguments = inputs(backbone, small)
    plain = output(transformer, arguments)
    lora = recipe.train.lora
    if lora is None:
        changed = [backbone.block(1)]
    else:
        spec.add_lora(transformer, lora)
        changed = [module for name, module in transformer.named_modules() if ".lora_B." in name]
    with torch.no_grad():
        for parameter in (p for module in changed for p in module.parameters()):
            parameter += 0.01 * torch.randn(parameter.shape, generator=draw)
    ours = output(transformer, arguments)
    with scratch_folder(beside) as scratch:
        if lora is None:
            product = scratch / spec.part
            transformer.save_pretrained(product)
        else:
            product = scratch / LORA_FILE
            Adapter.of(transformer).save_for_diffusers(product)
        classes = (spec.lora_pipeline, type(transformer).__name__)
        del backbone, transformer, changed
        theirs = stock_output(product, classes, (spec.source, spec.part), {}, arguments)
    moved = ((ours - plain).norm() / plain.norm()).item()
    error = ((theirs - ours).norm() / ours.norm()).item()
    record.add(
        "export",
        "ok" if error < EQUAL < moved else "fails",
        f"reloaded by stock diffusers it differs by {error:.1e}, at most {EQUAL:.0e} is allowed; "
        f"the change itself is {moved:.1e}",
    )
