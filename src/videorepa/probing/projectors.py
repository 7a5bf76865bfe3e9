"""The projectors of models, which were trained on the output of their blocks."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from videorepa.align.projector import PROJECTOR_FILE, Projector
from videorepa.align.terms import Term, Terms
from videorepa.artifacts.model import Model
from videorepa.artifacts.run import Run
from videorepa.errors import UserError
from videorepa.system.files import from_metadata
from videorepa.system.weights import Misfit, shapes

_ADVICE = "Choose other blocks with --blocks, or read the model without its projector."


def may_have_projector(path: Path) -> bool:
    """Whether a model is a run, or a pipeline beside the projector that `videorepa import` wrote.

    Others are untouched base models.
    """
    return Run.is_one(path) or (path / PROJECTOR_FILE).is_file()


def trained_projectors(model: Model, path: Path, blocks: Sequence[int]) -> dict[int, Any]:
    """Load the projector of each block, in float32 on the CPU.

    A run of weight 0, such as the control of an aligned run, has one too. It was trained on the
    same tokens, cut off from the transformer.

    Args:
        model: The opened model.
        path: Its path, for messages and for a projector beside it.

    Raises:
        UserError: A block has no projector or several, the projector was not trained, or it does
            not fit the model.
    """
    if not may_have_projector(path):
        raise UserError(
            f"{path} is neither a run nor a folder with {PROJECTOR_FILE} in it, so it has no "
            "projector to be read through. Leave out --through-projector, or this model."
        )
    if model.run is None or model.trained is None:
        return {blocks[0]: _imported(model, path / PROJECTOR_FILE, blocks)}
    recipe = model.run.recipe
    with torch.device("meta"):
        terms = Terms(recipe, model.spec.shapes(recipe.data))
    saved = model.trained.projector
    _fill(terms, saved, model.run.checkpoints)
    return {block: _of_run(terms, block, model.trained.step, path) for block in blocks}


def _of_run(terms: Terms, block: int, step: int, path: Path) -> nn.Module:
    found = {
        name: term
        for name, (_, term) in zip(terms.names, terms.named(), strict=True)
        if term.align.block == block and term.align.projector != "none"
    }
    if not found:
        raise UserError(
            f"The run {path} has no projector at block {block}: {_where(terms)}. {_ADVICE}"
        )
    if len(found) > 1:
        raise UserError(
            f"The run {path} has {len(found)} projectors at block {block}, of the alignments "
            f"{', '.join(found)}; expected one. {_ADVICE}"
        )
    ((name, term),) = found.items()
    if not any(term.runs(earlier) for earlier in range(step)):
        raise UserError(
            f"The projector of the run {path} is untrained at step {step}: the alignment {name} "
            "counted at no step before it. Train the run further."
        )
    return term.projector


def _where(terms: Terms) -> str:
    def described(term: Term) -> str:
        without = " without a projector" if term.align.projector == "none" else ""
        return f"block {term.align.block}{without}"

    sides = [described(term) for _, term in terms.named()]
    return f"its recipe aligns {', '.join(sides)}" if sides else "its recipe aligns nothing"


def _imported(model: Model, path: Path, blocks: Sequence[int]) -> nn.Module:
    try:
        with safe_open(path, "pt") as file:
            saved = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            trained_at = from_metadata(file.metadata()).get("block")
        hidden, width = saved["mlp.0.weight"].shape
        teacher_width = saved["mlp.4.weight"].shape[0]
        rows, columns = saved["conv.weight"].shape[2:] if "conv.weight" in saved else (1, 1)
    except (OSError, SafetensorError, KeyError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is not a projector as `videorepa import` writes it ({error!r}). Import it "
            "again."
        ) from None
    if len(blocks) > 1 or trained_at not in (None, *blocks):
        at = "one block" if trained_at is None else f"block {trained_at}"
        raise UserError(
            f"The projector {path} was trained at {at}; got {', '.join(map(str, blocks))}. "
            f"{_ADVICE}"
        )
    tokens = model.spec.shapes(model.size).grid.width
    if width != tokens:
        raise UserError(
            f"The projector {path} takes tokens of {width} channels, and those of {model.name} "
            f"have {tokens}: it is another model's."
        )
    with torch.device("meta"):
        projector = Projector(width, teacher_width, hidden, (rows, columns))
    _fill(projector, saved, path)
    return projector


def _fill(module: nn.Module, saved: Mapping[str, Tensor], path: Path) -> None:
    """Give a module on the meta device its weights."""
    if misfit := Misfit.between(saved, shapes(module.state_dict())):
        raise UserError(f"The projector in {path} is of another model; {misfit}.")
    module.load_state_dict({key: value.float() for key, value in saved.items()}, assign=True)
    module.requires_grad_(False)


def digest(projectors: Mapping[int, nn.Module]) -> str:
    """A digest, 16 hexadecimal digits, of the projectors' weights."""
    whole = hashlib.sha256()
    for block, projector in sorted(projectors.items()):
        for key, value in sorted(projector.state_dict().items()):
            whole.update(f"{block} {key}".encode())
            whole.update(value.numpy().tobytes())
    return whole.hexdigest()[:16]
