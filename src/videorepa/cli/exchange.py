"""Commands that bring weights in and out."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import tyro

from videorepa.cli.options import Positional


def export(
    run: Positional[Annotated[Path, tyro.conf.arg(metavar="RUN")]],
    out: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]],
    dtype: Literal["float32", "bfloat16"] = "float32",
    format: Literal["diffusers", "comfyui"] = "diffusers",
    fuse: bool = False,
    scores: tuple[Path, ...] = (),
) -> None:
    """Write what a run has trained as a folder (or LoRA file) that plain diffusers loads.

    Stock diffusers loads the result in a process of its own, and the outputs are compared.

    For example:
      videorepa export runs/videorepa-2b exported
      videorepa export runs/videorepa-5b for-comfyui --format comfyui
      videorepa export runs/videorepa-5b whole --fuse --scores clips/aligned/scores

    Args:
      run: Folder that `train` wrote.
      out: Folder to write; must not exist yet, unless it holds this very export.
      dtype: Dtype of the written weights.
      format: Layout of a LoRA file.
      fuse: Fold a LoRA into the weights and write the whole transformer.
      scores: Folders of this model's scores, for the model card; by default those in the run.
    """
    import torch

    from videorepa.export import export

    product = export(run, out, dtype=getattr(torch, dtype), format=format, fuse=fuse, scores=scores)
    print(f"exported and checked: {product}")


def import_(
    source: Positional[Annotated[str, tyro.conf.arg(metavar="SRC")]],
    out: Positional[Annotated[Path, tyro.conf.arg(metavar="DIR")]],
    alpha: float | None = None,
    base: str | None = None,
) -> None:
    """Bring published VideoREPA weights into files that plain diffusers loads.

    A transformer's folder or a DeepSpeed ZeRO-2 checkpoint becomes a stock transformer, and the
    projector goes into a file of its own. A LoRA's strength, alpha / rank, is multiplied into its
    weights.

    For example:
      videorepa import VideoREPA-2B imported
      videorepa import VideoREPA-5B/pytorch_lora_weights.safetensors imported --alpha 64
      videorepa import checkpoint-4000 imported --base zai-org/CogVideoX-2b

    Args:
      source: A path or a Hub id.
      out: Folder to write; must not exist yet.
      alpha: Alpha of a LoRA, whose strength is alpha / rank; VideoREPA-5B was trained with 64.
      base: The model that a DeepSpeed checkpoint was trained from; by default CogVideoX-2B.
    """
    from videorepa.import_weights import import_weights

    imported = import_weights(source, out, alpha=alpha, base=base)
    print(f"imported: {imported.product}")
    if imported.projector is not None:
        print(f"projector: {imported.projector}")
