"""Merges a DeepSpeed ZeRO stage 2 checkpoint into whole float32 weights, without DeepSpeed.

The files are pickles. They are read as plain data, and the script `zero_to_fp32.py` that DeepSpeed
leaves beside them is never run.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videorepa.errors import UserError, as_user_error
from videorepa.system.files import check_is_file, read_bytes

_PARTITION = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

_MODEL = "mp_rank_00_model_states.pt"

_ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of DeepSpeed whose objects are in its files, beside the weights."""


class _Ignored:
    """Stands in for an object of an `_ALLOWED` class: it keeps the values and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def holds_partitions(folder: Path) -> bool:
    """Whether a folder is, or holds, a ZeRO checkpoint."""
    return (folder / "zero_to_fp32.py").is_file() or bool(_tagged(folder))


def merge(folder: Path) -> dict[str, Tensor]:
    """Merge the float32 weights of a checkpoint, with buffers and frozen weights.

    For each group of parameters, every rank holds an equal part of one flat vector. The vector is
    the concatenated parameters, padded to a multiple of twice the number of ranks.

    Args:
      folder: The folder that DeepSpeed wrote, or the folder in it that holds the files.

    Returns:
      The weights by their names in the model.

    Raises:
      UserError: The checkpoint has another layout or lacks a part, a file is not plain data, or the
        weights do not agree with the checkpoint's own copy in half precision.
    """
    states = _states_folder(folder)
    paths = _partition_paths(states)
    model = _load(states / _MODEL)
    partitions = [_load(path) for path in paths]
    try:
        weights = _concatenated(model, [part["optimizer_state_dict"] for part in partitions])
        stored = {
            name: value for name, value in model["module"].items() if isinstance(value, Tensor)
        }
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{states} is not laid out as DeepSpeed's ZeRO stage 2 leaves it "
            f"({type(error).__name__}: {error})."
        ) from None
    # Half precision is rounded float32. So weights differ if the partitions are of another step, in
    # another order or in another layout.
    unlike = [
        name
        for name in weights.keys() & stored.keys()
        if weights[name].shape != stored[name].shape
        or not torch.allclose(weights[name].float(), stored[name].float(), rtol=2**-7, atol=1e-6)
    ]
    if unlike:
        raise UserError(
            f"The partitions in {states} do not agree with {_MODEL}: {len(unlike)} of "
            f"{len(weights)} weights differ, such as {min(unlike)}. Are all files of the same step?"
        )
    return weights


def _concatenated(model: dict[str, Any], partitions: list[dict[str, Any]]) -> dict[str, Tensor]:
    stage = partitions[0]["zero_stage"]
    stage = stage.values[0] if isinstance(stage, _Ignored) else stage
    if stage not in (1, 2):
        raise UserError(
            f"The checkpoint is of ZeRO stage {stage}; only stages 1 and 2 can be merged."
        )
    ranks = partitions[0]["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if ranks != len(partitions):
        raise UserError(
            f"{ranks} processes wrote the checkpoint, and it has the partitions of "
            f"{len(partitions)}. Copy the missing *_optim_states.pt files too."
        )
    weights = {name: model["module"][name] for name in model["buffer_names"]}
    weights |= model.get("frozen_param_fragments") or {}
    # Newer versions can leave gaps after single parameters.
    gaps = partitions[0].get("param_alignment_paddings")
    for group, shapes in enumerate(model["param_shapes"]):
        flat = torch.cat([part["single_partition_of_fp32_groups"][group] for part in partitions])
        spaces = gaps[group] if gaps else [0] * len(shapes)
        start = 0
        for (name, shape), space in zip(shapes.items(), spaces, strict=True):
            weights[name] = flat.narrow(0, start, math.prod(shape)).view(shape)
            start += math.prod(shape) + space
        unit = 2 * ranks
        if flat.numel() > math.ceil(start / unit) * unit:
            raise UserError(
                f"The partitions hold {flat.numel()} values where the parameters have {start}. "
                "They are of another model than the file beside them."
            )
    for name, same in dict(model.get("shared_params") or {}).items():
        weights[name] = weights[same]
    return weights


def _tagged(folder: Path) -> list[Path]:
    """Find the folders with partitions among this one and those in it."""
    paths = [*folder.glob("*_optim_states.pt"), *folder.glob("*/*_optim_states.pt")]
    return sorted({path.parent for path in paths if _PARTITION.fullmatch(path.name)})


def _states_folder(folder: Path) -> Path:
    tagged, latest = _tagged(folder), folder / "latest"
    if len(tagged) > 1 and latest.is_file():
        tag = read_bytes(latest).decode(errors="replace").strip()
        tagged = [path for path in tagged if path.name == tag]
    if len(tagged) != 1:
        names = ", ".join(path.name for path in _tagged(folder))
        raise UserError(
            f"{folder} holds {f'several checkpoints ({names})' if names else 'no partitions'}; "
            "expected one folder with *_optim_states.pt files, such as pytorch_model, in it. "
            f"{'Give one of them.' if names else 'Was all of it copied?'}"
        )
    return tagged[0]


def _partition_paths(states: Path) -> list[Path]:
    """List the files of all ranks in the order of the ranks."""
    by_rank = {}
    for path in states.iterdir():
        if match := _PARTITION.fullmatch(path.name):
            if int(match[2]):
                raise UserError(
                    f"{states} is of a model with tensor parallelism, which cannot be merged."
                )
            by_rank[int(match[1])] = path
    ranks = sorted(by_rank)
    if ranks != list(range(len(ranks))):
        raise UserError(
            f"{states} holds the partitions of ranks {', '.join(map(str, ranks))}; "
            "those between are missing. Copy them too."
        )
    if not (states / _MODEL).is_file():
        raise UserError(
            f"{states} has no {_MODEL}, which names the weights. ZeRO stage 2 writes it; stage 3 "
            "does not and cannot be merged."
        )
    return [by_rank[rank] for rank in ranks]


def _load(path: Path) -> dict[str, Any]:
    """Map a file as plain data, without reading it: most of it is optimiser state."""
    check_is_file(path)

    def described(error: Exception) -> str:
        refused = re.search(r"GLOBAL (\S+)", str(error))
        reason = f"it asks for {refused[1]}" if refused else type(error).__name__
        return (
            f"{path} cannot be read as plain data ({reason}). It is damaged, or it would run "
            "code; such a file is never loaded."
        )

    with (
        as_user_error(described),
        torch.serialization.safe_globals([(_Ignored, name) for name in _ALLOWED]),
    ):
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a table.")
    return content
