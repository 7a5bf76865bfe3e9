"""The processes of a training: one alone, replicas (DDP), or shards (FSDP2)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

State = dict[str, Any]
"""An optimiser's state as torch gives it: of each parameter by its number, and of the groups."""


class Alone:
    """The training has one process; everything is where it seems to be.

    rank, count: this process's number, and how many there are.
    is_sharded: whether the shared model's parts lie in several processes, which then all have to
        run it.
    """

    rank, count = 0, 1
    is_sharded = False

    def __init__(self, device: torch.device) -> None:
        self.device = device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def share(self, model: nn.Module, optimizer: Optimizer, blocks: set[str]) -> nn.Module:
        """The model to call in join_workers of `model`, so that gradients come from all processes.

        blocks: names of the classes whose parameters are gathered together when they are sharded.
        """
        return model

    @contextmanager
    def passing(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Around one micro-batch; gradients are complete after a step's last one."""
        yield

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale the parameters' gradients to a joint norm of at most `limit`; gives what it was."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def step(self, optimizer: Optimizer) -> None:
        """Update the parameters and forget the gradients."""
        optimizer.step()
        optimizer.zero_grad()

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        """The values' means over all processes."""
        return values

    def told(self, number: int) -> int:
        """The first process's number, for all."""
        return number

    def whole(self, tensor: Tensor) -> Tensor:
        """A tensor without its sharding; all processes have to ask."""
        return tensor

    def sharded_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """What `whole` gave, as `like` is sharded."""
        return tensor

    def collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors whole and in the machine's memory, on the first process; nothing on the
        others, which have to ask too. One after the other, or a device would have to hold all."""
        found = {}
        for key, value in tensors.items():
            tensor = self.whole(value.detach())
            if self.is_first:
                found[key] = tensor.cpu()
        return found

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """Its state on the first process, as if it had been alone; all have to ask."""
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        """Take up what `optimizer_state` gave, whatever shared the training then."""
        optimizer.load_state_dict(state)

    def wait(self) -> None:
        """Until all processes are here."""


class Replicated(Alone):
    """A launcher has started several processes; each holds the whole model, as DDP has it."""

    called: ClassVar = "DDP"

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.device)
        self._accelerator = accelerator
        # Without a GPU, Accelerate takes each of DeepSpeed's processes to be alone.
        self.rank, self.count = torch.distributed.get_rank(), torch.distributed.get_world_size()

    def share(self, model: nn.Module, optimizer: Optimizer, blocks: set[str]) -> nn.Module:
        return self._accelerator.prepare(model, optimizer)[0]

    @contextmanager
    def passing(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        if is_last:
            yield
            return
        with self._accelerator.no_sync(model):
            yield

    def mean(self, values: dict[str, float]) -> dict[str, float]:
        tensor = torch.tensor(list(values.values()), dtype=torch.float64, device=self.device)
        torch.distributed.all_reduce(tensor)
        return dict(zip(values, (tensor / self.count).tolist(), strict=True))

    def told(self, number: int) -> int:
        tensor = torch.tensor(number, device=self.device)
        torch.distributed.broadcast(tensor, 0)
        return int(tensor)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


class Sharded(Replicated):
    """FSDP2: each process holds a share of every parameter."""

    called: ClassVar = "FSDP2"

    def share(self, model: nn.Module, optimizer: Optimizer, blocks: set[str]) -> nn.Module:
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        plugin = self._accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(blocks)
        plugin.activation_checkpointing = False  # The recipe's business.
        self.is_sharded = True
        return super().share(model, optimizer, blocks)

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        return self.whole(super().clip_gradients(parameters, limit))

    def whole(self, tensor: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor

        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def sharded_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        from torch.distributed.tensor import DTensor, distribute_tensor

        if not isinstance(like, DTensor):
            return tensor
        return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements)

    def optimizer_state(self, optimizer: Optimizer) -> State:
        found = optimizer.state_dict()
        return found | {"state": {n: self.collected(each) for n, each in found["state"].items()}}

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shares = {
            number: {
                key: self.sharded_like(value, parameters[number]) if value.dim() else value
                for key, value in each.items()
            }
            for number, each in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": shares})
