"""Shares a training among processes with Accelerate, as replicas (DDP) or as shards (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.sections import Parallel
from videorepa.system.device import pick_device
from videorepa.system.progress import console

PATIENCE = timedelta(days=1)
"""How long a process waits for the others. One that has no validation clip to make waits for those
that have. Where a process dies, the launcher ends the others at once."""

State = dict[str, Any]
"""An optimiser's state as torch has it: each parameter's state by its number, and the groups."""


@dataclass(frozen=True, slots=True)
class Sharing:
    """What processes have to know of a model to share its training.

    Attributes:
      together: Names of the classes of modules whose parameters are gathered together.
      gathered_in: The dtype to gather parameters in; by default the one that they have.
      lacks_gradients: Whether trained parameters can go without a gradient in a step.
    """

    together: set[str]
    gathered_in: torch.dtype | None = None
    lacks_gradients: bool = False


class Alone:
    """A training in one process.

    The subclasses share a training among several. Where a method says that all processes call it,
    a process that does not call it leaves the others waiting.

    Attributes:
      rank: This process's number, from 0.
      count: The number of processes.
      context: How many neighbouring processes share the tokens of each clip.
      home: Where a whole model waits until it is shared: on the device, or in main memory where it
        becomes shards.
      is_sharded: Whether the shared model's parameters are spread over the processes. All of them
        then have to run it together.
    """

    rank, count, context = 0, 1, 1
    is_sharded = False

    def __init__(self, device: torch.device) -> None:
        self.device = self.home = device

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    @property
    def part(self) -> int:
        """The part of each step's clips that this process sees, from 0."""
        return self.rank // self.context

    @property
    def parts(self) -> int:
        """How many parts a step's clips are divided into among the processes."""
        return self.count // self.context

    def share(self, model: nn.Module, optimizer: Optimizer, sharing: Sharing) -> nn.Module:
        """Give the module to call in place of `model`, whose backward pass averages gradients.

        Args:
          model: The module that is trained; its parameters become shards where it is sharded.
          optimizer: Updates the model's parameters, also after they have become shards.
          sharing: What has to be known of the model.
        """
        return model

    @contextmanager
    def accumulating(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        """Wrap the passes of one micro-batch; the last one of a step averages gradients."""
        yield

    @contextmanager
    def sampling(self, model: nn.Module) -> Iterator[None]:
        """Wrap forward passes of the shared model or of a part, without gradients."""
        yield

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        """Scale gradients to a joint norm of at most `limit`, and return the norm before that."""
        return nn.utils.clip_grad_norm_(parameters, limit)

    def mean(self, values: Tensor) -> Tensor:
        """Average each value over the processes. All processes call it."""
        return values

    def broadcast(self, number: int) -> int:
        """Give the first process's number to all. All processes call it."""
        return number

    def whole(self, tensor: Tensor) -> Tensor:
        """Gather a sharded tensor. All processes call it."""
        return tensor

    def sharded_like(self, tensor: Tensor, like: Tensor) -> Tensor:
        """Shard a whole tensor as `like` is. All processes call it."""
        return tensor

    def collected(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Gather tensors in the first process's main memory; the others get an empty dictionary.

        All processes call it. The tensors go one by one, so that a device need not hold them all.
        """
        collected = {}
        for key, value in tensors.items():
            tensor = self.whole(value.detach())
            if self.is_first:
                collected[key] = tensor.cpu()
        return collected

    def optimizer_state(self, optimizer: Optimizer) -> State:
        """Gather the state on the first process, as one process alone would have it.

        All processes call it.
        """
        return optimizer.state_dict()

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        """Load what `optimizer_state` gave, whichever engine shared that training."""
        optimizer.load_state_dict(state)

    def wait(self) -> None:
        """Wait until all processes are here."""


class Replicated(Alone):
    """DDP: each process holds the whole model and averages its gradients with the others'."""

    label: ClassVar = "DDP"

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator.device)
        self._accelerator = accelerator
        self.rank, self.count = accelerator.process_index, accelerator.num_processes

    def share(self, model: nn.Module, optimizer: Optimizer, sharing: Sharing) -> nn.Module:
        # What is not trained is the same in all processes. It must neither be compared nor moved,
        # since it may be offloaded.
        alike = [name for name, p in model.named_parameters() if not p.requires_grad]
        alike += [name for name, _ in model.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(
            model, alike
        )
        self._accelerator.ddp_handler.find_unused_parameters = sharing.lacks_gradients
        return self._accelerator.prepare(model, optimizer, device_placement=[False, False])[0]

    @contextmanager
    def accumulating(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        if is_last:
            yield
            return
        with self._accelerator.no_sync(model):
            yield

    def mean(self, values: Tensor) -> Tensor:
        total = values.double()
        torch.distributed.all_reduce(total)
        return total / self.count

    def broadcast(self, number: int) -> int:
        tensor = torch.tensor(number, device=self.device)
        torch.distributed.broadcast(tensor, 0)
        return int(tensor)

    def wait(self) -> None:
        self._accelerator.wait_for_everyone()


class Sharded(Replicated):
    """FSDP2: each process holds a shard of every parameter, gradient and moment."""

    label: ClassVar = "FSDP2"

    def __init__(self, accelerator: Any) -> None:
        super().__init__(accelerator)
        # Block by block, FSDP2 brings it to the device and keeps a shard there.
        self.home = torch.device("cpu")

    def share(self, model: nn.Module, optimizer: Optimizer, sharing: Sharing) -> nn.Module:
        from torch.distributed.fsdp import MixedPrecisionPolicy, register_fsdp_forward_method
        from torch.distributed.fsdp.wrap import transformer_auto_wrap_policy

        plugin = self._accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = transformer_auto_wrap_policy
        plugin.transformer_cls_names_to_wrap = sorted(sharing.together)
        plugin.activation_checkpointing = False  # The recipe decides on it.
        if sharing.gathered_in is not None:
            # Autocast decides on what is computed, such as positions, which stay in float32.
            plugin.mixed_precision_policy = MixedPrecisionPolicy(
                sharing.gathered_in, torch.float32, cast_forward_inputs=False
            )
        self.is_sharded = True
        shared: Any = self._accelerator.prepare(model, optimizer)[0]
        # FSDP2 sets itself up in the first forward pass, which has to be the whole model's. But
        # validation runs the transformer alone before, so this passes for one.
        shared.begin = lambda: None
        register_fsdp_forward_method(shared, "begin")
        shared.begin()
        return shared

    @contextmanager
    def sampling(self, model: nn.Module) -> Iterator[None]:
        from torch.distributed.fsdp import FSDPModule

        yield
        # Without a backward pass, gathered weights stay, and hide a checkpoint that is loaded.
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    @contextmanager
    def accumulating(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        # Gradients that are not averaged at once would be whole in each process until then.
        yield

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
        state = optimizer.state_dict()
        return state | {"state": {n: self.collected(each) for n, each in state["state"].items()}}

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        shards = {
            number: {
                key: self.sharded_like(value, parameters[number]) if value.dim() else value
                for key, value in each.items()
            }
            for number, each in state["state"].items()
        }
        optimizer.load_state_dict(state | {"state": shards})


ENGINES: dict[str, type[Replicated]] = {"ddp": Replicated, "fsdp2": Sharded}
"""The ways in which several processes can share a training, by `parallel.engine`."""

_LABELS = " or ".join(engine.label for engine in ENGINES.values())


def join_workers(recipe: Recipe, device: str | None) -> Alone:
    """Join the processes that a launcher has started, or train alone.

    Raises:
      UserError: The launcher and the recipe disagree, or ask for an engine that does not exist.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerator = make_accelerator(recipe, device)
        workers = _engine(accelerator, recipe.parallel)(accelerator)
        if recipe.parallel is not None:
            workers.context = recipe.parallel.context
        if workers.count % workers.context:
            raise UserError(
                f"parallel.context is {workers.context}, and there are {workers.count} processes. "
                "Start a multiple of it."
            )
        if workers.is_first:
            console.print(f"{workers.count} processes share the training with {workers.label}.")
        return workers
    if recipe.parallel is not None:
        raise UserError(
            f"The recipe asks for {recipe.parallel.engine} and there is one process. Start it with "
            "`accelerate launch -m videorepa train ...` or torchrun, or leave out `parallel`."
        )
    return Alone(pick_device(device))


def make_accelerator(recipe: Recipe, device: str | None) -> Any:
    """Set up Accelerate as the recipe's `parallel` says, or else as the launcher's configuration.

    Raises:
      UserError: Accelerate cannot do what it is asked for.
    """
    from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
    from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

    if _is_set("ACCELERATE_USE_DEEPSPEED"):  # On a CPU, Accelerate would silently ignore it.
        raise UserError(_unsupported("DeepSpeed"))
    # By default, transformers loads a teacher's weights in the first process alone.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # The view avoids a second copy of the gradients.
    ddp = DistributedDataParallelKwargs(gradient_as_bucket_view=True)
    # The student computes in the recipe's precision, and its weights are float32.
    group = InitProcessGroupKwargs(timeout=PATIENCE)
    options: dict[str, Any] = {"kwargs_handlers": [ddp, group], "mixed_precision": "no"}
    parallel = recipe.parallel
    try:
        if parallel is not None and parallel.engine == "fsdp2":
            # With it, Accelerate sets up communication about tensors on the CPU too.
            os.environ["FSDP_OFFLOAD_PARAMS"] = str(parallel.offload).lower()
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2,
                cpu_offload=parallel.offload,
                reshard_after_forward=parallel.reshard_after_forward,
            )
        elif _is_set("ACCELERATE_USE_FSDP"):
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        accelerator = Accelerator(cpu=pick_device(device).type == "cpu", **options)
    except (ImportError, ValueError) as error:
        reason = str(error).rstrip(". ")
        raise UserError(
            f"Accelerate cannot do what the recipe or its configuration asks for: {reason}. train "
            f"runs with {_LABELS}."
        ) from None
    if accelerator.distributed_type == DistributedType.MULTI_CPU and "fsdp_plugin" in options:
        # Accelerate ignores the plugin on CPUs, where sharding works as well.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = options["fsdp_plugin"]
    return accelerator


def _is_set(variable: str) -> bool:
    """Whether `accelerate launch` has set a switch of its configuration."""
    return os.environ.get(variable, "false").lower() == "true"


def _engine(accelerator: Any, parallel: Parallel | None) -> type[Replicated]:
    """Choose the engine that Accelerate is set up for."""
    state, label = accelerator.state, accelerator.distributed_type.value
    if label in ("MULTI_GPU", "MULTI_CPU"):
        label = Replicated.label
    elif label == "FSDP":
        label = f"FSDP{state.fsdp_plugin.fsdp_version}"
    if accelerator.parallelism_config is not None:
        label += " with a parallelism_config"
    if state.dynamo_plugin.backend.value != "NO":
        label += " with torch.compile"
    names = [name for name, engine in ENGINES.items() if engine.label == label]
    if not names:
        raise UserError(_unsupported(label))
    if parallel is not None and names != [parallel.engine]:
        raise UserError(
            f"The recipe asks for parallel.engine {parallel.engine}, the accelerate configuration "
            f"for {label}. Leave one of them out."
        )
    return ENGINES[names[0]]


def _unsupported(label: str) -> str:
    return (
        f"The accelerate configuration asks for {label}; train runs with {_LABELS}. Change it, or "
        "set parallel.engine in the recipe and start train without it. FSDP2 with "
        "reshard_after_forward false shards as ZeRO-2 does."
    )
