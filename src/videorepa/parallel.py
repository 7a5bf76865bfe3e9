"""One process or many: what a training needs of Hugging Face Accelerate, and nothing more."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from videorepa.device import pick_device
from videorepa.errors import UserError
from videorepa.recipe import Parallel, Recipe


class Alone:
    """The training has one process; everything is where it seems to be.

    rank, count: this process's number, and how many there are.
    """

    rank, count = 0, 1

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, model: nn.Module, optimizer: Optimizer, blocks: set[str]) -> nn.Module:
        """The model to call in place of `model`, so that gradients come from all processes.

        blocks: names of the classes whose parameters are gathered together when they are sharded.
        """
        return model

    @contextmanager
    def passing(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Around one micro-batch; gradients are exchanged in a step's last one alone."""
        yield

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The values' means over all processes."""
        return values

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor without its sharding; all processes have to ask."""
        return tensor

    def sharded_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """What `whole` gave, as `like` is sharded."""
        return tensor

    def wait(self) -> None:
        """Until all processes are here."""


class Launched(Alone):
    """Several processes that a launcher has started, with DDP or FSDP2 as Accelerate sets them up.

    drops_parts: whether there are parameters that get no gradient at some steps.
    """

    def __init__(self, parallel: Parallel | None, device: str | None, drops_parts: bool) -> None:
        from accelerate import Accelerator, DistributedDataParallelKwargs
        from accelerate.utils import FullyShardedDataParallelPlugin

        ddp = DistributedDataParallelKwargs(find_unused_parameters=drops_parts)
        options: dict[str, Any] = {"kwargs_handlers": [ddp]}
        if parallel is not None and parallel.engine == "fsdp2":
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                auto_wrap_policy="transformer_based_wrap",
                cpu_offload=parallel.offload,
                cpu_ram_efficient_loading=False,
            )
        self._accelerator = Accelerator(cpu=device == "cpu", **options)
        kind = self._accelerator.distributed_type.value
        if kind not in ("MULTI_GPU", "MULTI_CPU", "FSDP"):
            raise UserError(
                f"The launcher asks for {kind}; train runs in one process, with DDP or with FSDP2. "
                "Set parallel.engine in the recipe, or change the accelerate configuration."
            )
        self.rank, self.count = self._accelerator.process_index, self._accelerator.num_processes
        super().__init__(self._accelerator.device)

    def share(self, model: nn.Module, optimizer: Optimizer, blocks: set[str]) -> nn.Module:
        if (plugin := getattr(self._accelerator.state, "fsdp_plugin", None)) is not None:
            plugin.transformer_cls_names_to_wrap = sorted(blocks)
        shared, _ = self._accelerator.prepare(model, optimizer)
        return shared

    @contextmanager
    def passing(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        if is_last:
            yield
            return
        with self._accelerator.no_sync(model):
            yield

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        mean: Any = self._accelerator.reduce(tensor, "mean")
        return dict(zip(values, mean.tolist(), strict=True))

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def sharded_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


def place(recipe: Recipe, device: str | None) -> Alone:
    """This process's place among those that train."""
    parallel = recipe.parallel
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        courses = [term.when for term in recipe.terms.values()]
        return Launched(parallel, device, any(c.until or c.opposed for c in courses))
    if parallel is not None:
        raise UserError(
            f"The recipe asks for {parallel.engine} and there is one process. Start it with "
            "`accelerate launch -m videorepa train ...` or torchrun, or leave out `parallel`."
        )
    return Alone(pick_device(device))
