"""Saves and resumes a training: whole checkpoints or none, and the newest sound one is used."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from videorepa.errors import UserError
from videorepa.system.files import sync
from videorepa.system.progress import console

STATE = "state.json"

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""What comes of reading a damaged checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """What a training needs to go on, and what is handed out: nothing random is in it, since all
    randomness is a function of the seed and the sample's number.

    trained: trained tensors of the transformer. projector: the alignment's own weights.
    optimizer: AdamW's state. ema: averages of the trained tensors, if the recipe asks for them.
    stopping: what the alignment's stop rules go by, as plain values.
    batch: how many clips a step has over all processes; None where it was not noted.
    """

    step: int
    trained: dict[str, Tensor]
    projector: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    stopping: list[dict[str, Any]] = field(default_factory=list)
    batch: int | None = None


def save(folder: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write `folder/step-N` whole, then remove all but the newest `keep`.

    Raises UserError if the disk is full; what was there before is untouched then.
    """
    target = _place(folder, checkpoint.step)
    temporary = folder / f".tmp-{target.name}"
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        save_file(_flat(checkpoint.trained), temporary / "trained.safetensors")
        save_file(_flat(checkpoint.projector), temporary / "projector.safetensors")
        torch.save(checkpoint.optimizer, temporary / "optimizer.pt")
        if checkpoint.ema is not None:
            save_file(_flat(checkpoint.ema), temporary / "ema.safetensors")
        sizes = {file.name: file.stat().st_size for file in sorted(temporary.iterdir())}
        state = {"step": checkpoint.step, "sizes": sizes, "stopping": checkpoint.stopping}
        state["batch"] = checkpoint.batch
        (temporary / STATE).write_text(json.dumps(state))
        for file in temporary.iterdir():
            sync(file)
        if target.exists():
            shutil.rmtree(target)
        os.replace(temporary, target)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # The last two are how torch and safetensors say that the disk is full.
        shutil.rmtree(temporary, ignore_errors=True)
        reason = (error.strerror if isinstance(error, OSError) else None) or error
        raise UserError(
            f"The checkpoint at step {checkpoint.step} could not be written to {folder}: "
            f"{reason}. Earlier checkpoints are untouched; make room and run the "
            "same command again."
        ) from None
    # Later ones are damaged, or this training would have gone on from them: they do not count.
    for old in [path for path in _found(folder) if path.name <= target.name][:-keep]:
        shutil.rmtree(old)
    return target


def newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that is whole; damaged ones are named and passed over."""
    for path in reversed(_found(folder)):
        try:
            return _load(path)
        except _DAMAGE as error:
            console.print(
                f"The checkpoint {path} is damaged ({error}) and passed over.",
                markup=False,
            )
    return None


def at(folder: Path, step: int) -> Checkpoint:
    """The checkpoint of a step. Raises UserError if it is not there or damaged."""
    path = _place(folder, step)
    try:
        return _load(path)
    except _DAMAGE as error:
        steps = ", ".join(str(int(p.name.removeprefix("step-"))) for p in _found(folder))
        raise UserError(
            f"This process finds no usable checkpoint of step {step} in {folder} ({error}), but "
            f"those of {steps or 'none'}. train.keep_checkpoints says how many are kept; several "
            "processes need to see the same files."
        ) from None


def copy_into(found: Mapping[str, Tensor], ours: Mapping[str, Tensor]) -> None:
    """Copy tensors into ours of the same names. Raises UserError if they are another model's."""
    unlike = found.keys() ^ ours.keys() or {
        key for key in ours if ours[key].shape != found[key].shape
    }
    if unlike:
        raise UserError(
            f"The checkpoint is of another model: {len(unlike)} of {len(ours)} tensors do "
            f"not fit, such as {min(unlike)}. Choose another folder."
        )
    with torch.no_grad():
        for key, value in found.items():
            ours[key].copy_(value)


def _place(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def _found(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _load(path: Path) -> Checkpoint:
    state = json.loads((path / STATE).read_text())
    for name, size in state["sizes"].items():
        found = (path / name).stat().st_size
        if found != size:
            raise ValueError(f"{name} has {found} bytes, expected {size}")
    try:
        ema = path / "ema.safetensors"
        return Checkpoint(
            state["step"],
            load_file(path / "trained.safetensors"),
            load_file(path / "projector.safetensors"),
            torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            load_file(ema) if ema.exists() else None,
            state["stopping"],
            state.get("batch"),
        )
    except Exception as error:
        raise ValueError(str(error)) from None


def _flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
