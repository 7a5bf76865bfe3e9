"""Writes checkpoints of a training, whole or not at all, and reads them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from videorepa.errors import UserError, lacks_memory
from videorepa.system.files import file_digest, parse_json, refused_by_system, sync
from videorepa.system.hub import plain_weights
from videorepa.system.progress import console
from videorepa.system.weights import Misfit, shapes

STATE, MOMENTS = "state.json", "optimizer.pt"

_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError)
"""Errors of reading a damaged checkpoint."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a training after a step.

    It holds no random state, since all randomness is a function of the seed and the sample's
    number.

    Attributes:
        step: The number of optimiser steps done.
        trained: The transformer's trained tensors, by name.
        projector: The alignment's own weights, by name.
        optimizer: The optimiser's state; {} where it was not wanted.
        ema: Averages of the trained tensors, if the recipe asks for them.
        stopping: The state of the alignment's rules to stop, as plain values.
        batch: Clips per step over all processes; None if it was not recorded.
        meeting: By which version's rules the two sides of terms were brought together.
    """

    step: int
    trained: dict[str, Tensor]
    projector: dict[str, Tensor]
    optimizer: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    stopping: list[dict[str, Any]] = field(default_factory=list)
    batch: int | None = None
    meeting: int = 1


def save(folder: Path, checkpoint: Checkpoint, keep: int, between: bool = False) -> Path:
    """Write a checkpoint into a folder of its own below `folder`, then remove old ones.

    Args:
        folder: The folder of all checkpoints.
        checkpoint: What to write.
        keep: How many of the newest checkpoints to keep.
        between: Whether it lies between the regular checkpoints and goes with the next one.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: It could not be written. Earlier checkpoints are untouched.
    """
    target = step_folder(folder, checkpoint.step)
    temporary = folder / f".tmp-{target.name}"
    _remove_leftovers(folder)
    try:
        temporary.mkdir(parents=True)
        save_file(_flat(checkpoint.trained), temporary / "trained.safetensors")
        save_file(_flat(checkpoint.projector), temporary / "projector.safetensors")
        torch.save(checkpoint.optimizer, temporary / MOMENTS)
        if checkpoint.ema is not None:
            save_file(_flat(checkpoint.ema), temporary / "ema.safetensors")
        state = {
            "step": checkpoint.step,
            "sizes": {file.name: file.stat().st_size for file in sorted(temporary.iterdir())},
            "digests": _digests(temporary),
            "stopping": checkpoint.stopping,
            "batch": checkpoint.batch,
            "meeting": checkpoint.meeting,
            "between": between,
        }
        (temporary / STATE).write_text(json.dumps({**state, "digest": _digest(state)}))
        for file in temporary.iterdir():
            sync(file)
        if target.exists():
            _remove(target)
        os.replace(temporary, target)
        sync(folder)
    except (OSError, RuntimeError, SafetensorError) as error:
        # torch and safetensors raise the last two when the disk is full.
        shutil.rmtree(temporary, ignore_errors=True)
        number = refused_by_system(error)
        reason = error if number is None else os.strerror(number)
        raise UserError(
            f"The checkpoint at step {checkpoint.step} could not be written to {folder}: "
            f"{reason}. Earlier checkpoints are untouched; make room and run the "
            "same command again."
        ) from None
    tidy(folder, checkpoint.step, keep)
    return target


def tidy(folder: Path, step: int, keep: int) -> None:
    """Remove what is not wanted beside the checkpoint of a step.

    These are earlier checkpoints, but for the newest, and what a killed process has left.

    Args:
        folder: The folder of all checkpoints.
        step: The step that the training has reached.
        keep: How many of the newest checkpoints to keep, with this step's.
    """
    _remove_leftovers(folder)
    target = step_folder(folder, step)
    # Later checkpoints are damaged, or this training would have gone on from them.
    earlier = [path for path in _step_folders(folder) if path.name < target.name]
    regular = [path for path in earlier if not _lies_between(path)]
    kept = regular[max(0, len(regular) + 1 - keep) :]
    for path in earlier:
        if path not in kept:
            _remove(path)


def _lies_between(path: Path) -> bool:
    try:
        return parse_json((path / STATE).read_text())["between"]
    except _DAMAGE:
        return False


def _remove(path: Path) -> None:
    """Remove a checkpoint. Killed meanwhile, it leaves none that lacks a file."""
    removed = path.with_name(f".tmp-old-{path.name}")
    os.replace(path, removed)
    shutil.rmtree(removed)


def _remove_leftovers(folder: Path) -> None:
    for leftover in folder.glob(".tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def newest(folder: Path) -> Checkpoint | None:
    """Read the newest checkpoint that is whole, and print which damaged ones were passed over."""
    for path in reversed(_step_folders(folder)):
        try:
            return _load(path)
        except _DAMAGE as error:
            console.print(f"The checkpoint {path} is damaged ({error}) and is passed over.")
    return None


def last_step(folder: Path) -> int | None:
    """The step of the newest checkpoint, whole or damaged; None if there is none."""
    steps = _steps(folder)
    return steps[-1] if steps else None


def at(folder: Path, step: int, with_moments: bool = True) -> Checkpoint:
    """Read the checkpoint of a step.

    Args:
        folder: The folder of all checkpoints.
        step: The step.
        with_moments: Whether to read the optimiser's state, which is twice as large as the rest.

    Raises:
        UserError: It is missing or damaged.
    """
    path = step_folder(folder, step)
    if not path.is_dir():
        steps = ", ".join(map(str, _steps(folder)))
        raise UserError(
            f"{folder} has no checkpoint of step {step}; the steps there are {steps or 'none'}. "
            "train.keep_checkpoints says how many are kept; several processes need to see the same "
            "files."
        )
    try:
        return _load(path, with_moments)
    except _DAMAGE as error:
        earlier = [number for number in _steps(folder) if number < step]
        advice = "Run `videorepa train` again; it starts over."
        if earlier:
            advice = (
                "Run `videorepa train` again, which goes on from an earlier one, or delete that "
                f"folder to use the one of step {earlier[-1]}."
            )
        raise UserError(f"The checkpoint {path} is damaged: {error}. {advice}") from None


def copy_into(
    saved: Mapping[str, Tensor],
    ours: Mapping[str, Tensor],
    held_as: Callable[[Tensor, Tensor], Tensor] = lambda saved, ours: saved,
) -> None:
    """Copy saved tensors into ours.

    Args:
        saved: Tensors by name.
        ours: Tensors with the same names and shapes.
        held_as: Turns a saved tensor into the form of ours, which may be a shard.

    Raises:
        UserError: Names or shapes differ.
    """
    if misfit := Misfit.between(saved, shapes(ours)):
        raise UserError(f"The checkpoint is of another model; {misfit}. Choose another folder.")
    with torch.no_grad():
        for key, value in saved.items():
            ours[key].copy_(held_as(value, ours[key]))


def step_folder(folder: Path, step: int) -> Path:
    """Give the folder of a step's checkpoint, in the folder of all checkpoints."""
    return folder / f"step-{step:08d}"


def _step_folders(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _steps(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in _step_folders(folder)]


def _load(path: Path, with_moments: bool = True) -> Checkpoint:
    state = parse_json((path / STATE).read_text())
    _verify(path, state, () if with_moments else (MOMENTS,))
    try:
        optimizer, ema, moments = path / MOMENTS, path / "ema.safetensors", {}
        if with_moments:
            with plain_weights(optimizer):
                moments = torch.load(optimizer, map_location="cpu", weights_only=True)
        return Checkpoint(
            state["step"],
            load_file(path / "trained.safetensors"),
            load_file(path / "projector.safetensors"),
            moments,
            load_file(ema) if "ema.safetensors" in state["sizes"] else None,
            state["stopping"],
            state.get("batch"),
            state.get("meeting", 1),
        )
    except Exception as error:
        if lacks_memory(error):  # A whole checkpoint must not pass for a damaged one.
            raise MemoryError(str(error)) from None
        raise ValueError(str(error)) from None


def _verify(path: Path, state: dict[str, Any], unread: Container[str]) -> None:
    """Raise ValueError or OSError if a file is not the one that was written.

    Of the files that are not read, only the sizes are compared.
    """
    for name, size in state["sizes"].items():
        actual = (path / name).stat().st_size
        if actual != size:
            raise ValueError(f"{name} has {actual} bytes, expected {size}")
    if "digest" not in state and "digests" not in state:
        console.print(
            f"The checkpoint {path} is of an older version, without digests of its files: only "
            "their sizes were compared.",
        )
        return
    rest = {key: value for key, value in state.items() if key != "digest"}
    if _digest(rest) != state["digest"]:
        raise ValueError(f"{STATE} has other content than was written")
    read = [name for name in state["digests"] if name not in unread]
    for name, digest in _digests(path, read).items():
        if digest != state["digests"][name]:
            raise ValueError(f"{name} has other content than was written")
    if path != step_folder(path.parent, state["step"]):
        raise ValueError(f"{STATE} is of step {state['step']}")


def _digests(folder: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """The digests of the files, which are read at the same time; by default of all."""
    names = sorted(names or os.listdir(folder))
    with ThreadPoolExecutor() as threads:
        return dict(zip(names, threads.map(lambda n: file_digest(folder / n), names), strict=True))


def _digest(state: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def _flat(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value.detach().to("cpu").contiguous() for key, value in tensors.items()}
