"""Merges a DeepSpeed ZeRO stage 2 checkpoint into whole float32 weights, without DeepSpeed.

DeepSpeed leaves a script `zero_to_fp32.py` beside such a checkpoint. It is never run here, and the
files, which are pickles, are read as plain data alone.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videorepa.errors import UserError
from videorepa.system.files import check_is_file, read_text

_PARTITION = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")

_MODEL = "mp_rank_00_model_states.pt"

_ALLOWED = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
"""Classes of DeepSpeed's whose objects lie in its files beside the weights."""


class _Ignored:
    """Takes the place of such an object, which is not needed: it keeps values and does nothing."""

    def __init__(self, *values: Any) -> None:
        self.values = values


def holds_partitions(folder: Path) -> bool:
    """Whether a folder is, or holds, a ZeRO checkpoint of DeepSpeed's."""
    return (folder / "zero_to_fp32.py").is_file() or bool(_tagged(folder))


def merge(folder: Path) -> dict[str, Tensor]:
    """The float32 weights of a checkpoint by their names in the model, buffers and frozen ones too.

    folder: as DeepSpeed writes it, with the files in a folder of their own, or that folder.
    Of each group of parameters, every rank holds an equal part of one flat vector, which is the
    parameters one after the other, filled up to a multiple of twice the number of ranks.
    Raises UserError for another layout, a missing part, a file that is not plain data, and if the
    outcome does not agree with the model's own copy in half precision.
    """
    states = _states_folder(folder)
    paths = _partition_paths(states)
    model = _load(states / _MODEL)
    partitions = [_load(path) for path in paths]
    try:
        weights = _merged(model, [part["optimizer_state_dict"] for part in partitions])
        stored = {
            name: value for name, value in model["module"].items() if isinstance(value, Tensor)
        }
    except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{states} is not laid out as DeepSpeed's ZeRO stage 2 leaves it "
            f"({type(error).__name__}: {error})."
        ) from None
    # Half precision is rounded float32, so this finds partitions that are of another step, in
    # another order, or laid out otherwise.
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


def _merged(model: dict[str, Any], partitions: list[dict[str, Any]]) -> dict[str, Tensor]:
    stage = partitions[0]["zero_stage"]
    stage = stage.values[0] if isinstance(stage, _Ignored) else stage
    if stage not in (1, 2):
        raise UserError(f"The checkpoint is of ZeRO stage {stage}; stage 2 can be merged.")
    ranks = partitions[0]["partition_count"]
    ranks = max(ranks) if isinstance(ranks, list) else ranks
    if ranks != len(partitions):
        raise UserError(
            f"The checkpoint was written by {ranks} processes, and the partitions of "
            f"{len(partitions)} are there. Copy the missing *_optim_states.pt files too."
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
    """Folders with partitions in them: this one, or those in it."""
    found = [*folder.glob("*_optim_states.pt"), *folder.glob("*/*_optim_states.pt")]
    return sorted({path.parent for path in found if _PARTITION.fullmatch(path.name)})


def _states_folder(folder: Path) -> Path:
    tagged, latest = _tagged(folder), folder / "latest"
    if len(tagged) > 1 and latest.is_file():
        tagged = [path for path in tagged if path.name == read_text(latest).strip()]
    if len(tagged) != 1:
        names = ", ".join(path.name for path in _tagged(folder))
        raise UserError(
            f"{folder} holds {f'several checkpoints ({names})' if names else 'no partitions'}; "
            "expected one folder with *_optim_states.pt files, such as pytorch_model, in it. "
            f"{'Give one of them.' if names else 'Was all of it copied?'}"
        )
    return tagged[0]


def _partition_paths(states: Path) -> list[Path]:
    """The ranks' files in the order of the ranks."""
    found = {}
    for path in states.iterdir():
        if match := _PARTITION.fullmatch(path.name):
            rank, slice_ = int(match[1]), int(match[2])
            if slice_:
                raise UserError(f"{states} is of a model in parallel slices, which is not merged.")
            found[rank] = path
    if sorted(found) != list(range(len(found))):
        raise UserError(
            f"{states} holds the partitions of ranks {', '.join(map(str, sorted(found)))}; "
            "those between are missing. Copy them too."
        )
    if not (states / _MODEL).is_file():
        raise UserError(
            f"{states} has no {_MODEL}, which names the weights. ZeRO stage 2 writes one; stage 3, "
            "which does not, is not merged."
        )
    return [found[rank] for rank in range(len(found))]


def _load(path: Path) -> dict[str, Any]:
    """One file as plain data. Mapped, not read: most of it is optimiser state."""
    check_is_file(path)
    try:
        with torch.serialization.safe_globals([(_Ignored, name) for name in _ALLOWED]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:
        said = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it asks for {said[1]}" if said else f"{type(error).__name__}"
        raise UserError(
            f"{path} cannot be read as plain data ({what}). It is damaged, or a pickle that would "
            "run code, which is never loaded."
        ) from None
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}; expected a table.")
    return content
