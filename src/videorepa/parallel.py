"""One process or many: what a training needs of Hugging Face Accelerate, and nothing more."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from videorepa.device import pick_device
from videorepa.errors import UserError
from videorepa.progress import console
from videorepa.recipe import Parallel, Recipe

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
        """The model to call in place of `model`, so that gradients come from all processes.

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


class Partitioned(Replicated):
    """DeepSpeed's ZeRO-2: each process holds all weights, and gradients and the optimiser's state
    of a part of them, which it updates for all.

    The parameters lie one after the other in a flat vector, of which each process has an equal
    stretch, the optimiser's one parameter there. DeepSpeed notes with each parameter which piece
    of it is in this process's stretch, and where (`_hp_mapping`): clipping and checkpoints go by
    that.
    """

    called: ClassVar = "DeepSpeed ZeRO-2"

    def share(self, model: nn.Module, optimizer: Optimizer, blocks: set[str]) -> nn.Module:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        config = self._accelerator.state.deepspeed_plugin.deepspeed_config
        zero = {key: value for key, value in config["zero_optimization"].items() if value != "auto"}
        config.clear()
        # Batches, accumulation, clipping and precision are the recipe's and this training's.
        config |= {
            "zero_optimization": zero,
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": 0.0,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": float("inf"),
        }
        self._parameters: list[Any] = parameters
        self._engine: Any = super().share(model, optimizer, blocks)
        return self._engine

    @contextmanager
    def passing(self, model: nn.Module, is_last: bool) -> Iterator[None]:
        self._engine.set_gradient_accumulation_boundary(is_last)
        yield

    def backward(self, loss: Tensor) -> None:
        self._engine.backward(loss, scale_wrt_gas=False)

    def clip_gradients(self, parameters: Iterable[Tensor], limit: float) -> Tensor:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # Offloaded gradients may still be on their way.
        pieces = [self._gradient(parameter) for parameter in parameters]
        own = nn.utils.get_total_norm([piece for piece in pieces if piece is not None])
        square = own.to(self.device).square()
        torch.distributed.all_reduce(square)
        norm = square.sqrt()
        scale = (limit / (norm + 1e-6)).clamp(max=1.0)  # As torch does it.
        for piece in pieces:
            if piece is not None:
                piece.mul_(scale.to(piece.device))
        return norm

    def step(self, optimizer: Optimizer) -> None:
        self._engine.step()
        if self._engine.zero_cpu_offload():
            # DeepSpeed leaves them as they were where the next step gives none.
            for parameter in self._parameters:
                if (piece := self._gradient(parameter)) is not None:
                    piece.zero_()

    def optimizer_state(self, optimizer: Optimizer) -> State:
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[int, State] = {}
        (group,) = optimizer.state_dict()["param_groups"]
        (flat,) = optimizer.state.values()
        for number, parameter in enumerate(self._parameters):
            state[number] = {}
            for key, value in flat.items():
                if value.dim():
                    value = safe_get_full_optimizer_state(parameter, key)
                if self.is_first:
                    state[number][key] = value.cpu().clone()  # The step is each parameter's own.
        return {
            "state": state,
            "param_groups": [group | {"params": list(range(len(self._parameters)))}],
        }

    def load_optimizer_state(self, optimizer: Optimizer, state: State) -> None:
        (stretch,) = optimizer.param_groups[0]["params"]
        flat = optimizer.state[stretch]
        for number, each in state["state"].items():
            mapping = self._parameters[number]._hp_mapping
            for key, value in each.items():
                if not value.dim():
                    # One for all parameters. Those that a term has ceased to train are behind.
                    flat[key] = torch.maximum(flat.get(key, value), value)
                    continue
                flat.setdefault(key, torch.zeros_like(stretch))
                if mapping is not None:
                    here, there = mapping.hp_fragment_address, mapping.lp_fragment_address
                    piece = value.flatten().narrow(0, there.start, there.numel)
                    flat[key].narrow(0, here.start, here.numel).copy_(piece)

    def _gradient(self, parameter: Any) -> Tensor | None:
        """The piece of a parameter's gradient that is in this process's stretch."""
        if (mapping := parameter._hp_mapping) is None:
            return None
        return mapping.get_lp_grad_fragment(parameter._index_in_param_group)


ENGINES: dict[str, type[Replicated]] = {
    "ddp": Replicated,
    "fsdp2": Sharded,
    "zero2": Partitioned,
}
"""What several processes can share a training with, by `parallel.engine`."""


def place(recipe: Recipe, device: str | None) -> Alone:
    """This process's place among those that train.

    Raises UserError if the launcher and the recipe ask for different things, or for what is not
    there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerator = _accelerator(recipe, device)
        workers = _engine(accelerator, recipe.parallel)(accelerator)
        if workers.is_first:
            console.print(f"{workers.count} processes share the training with {workers.called}.")
        return workers
    if recipe.parallel is not None:
        raise UserError(
            f"The recipe asks for {recipe.parallel.engine} and there is one process. Start it with "
            "`accelerate launch -m videorepa train ...` or torchrun, or leave out `parallel`."
        )
    return Alone(pick_device(device))


def _accelerator(recipe: Recipe, device: str | None) -> Any:
    """Accelerate as the recipe's `parallel` says, or else as the launcher's configuration does."""
    from accelerate import Accelerator, DistributedDataParallelKwargs
    from accelerate.utils import (
        DeepSpeedPlugin,
        DistributedType,
        FullyShardedDataParallelPlugin,
    )

    # Else transformers leaves a teacher without weights in all processes but the first.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    courses = [term.when for term in recipe.terms.values()]
    drops_parts = any(course.until or course.opposed for course in courses)
    ddp = DistributedDataParallelKwargs(
        find_unused_parameters=drops_parts,
        gradient_as_bucket_view=True,  # Or there is another copy of all gradients.
    )
    # The recipe says in which precision to compute; weights in training are float32.
    options: dict[str, Any] = {"kwargs_handlers": [ddp], "mixed_precision": "no"}
    engine = None if recipe.parallel is None else recipe.parallel.engine
    offload = recipe.parallel is not None and recipe.parallel.offload
    has_deepspeed = engine == "zero2" or _is_set("ACCELERATE_USE_DEEPSPEED")
    try:
        if engine == "fsdp2":
            # By this, Accelerate has the processes talk about what is in the machine's memory too.
            os.environ["FSDP_OFFLOAD_PARAMS"] = str(offload).lower()
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin(
                fsdp_version=2, cpu_offload=offload
            )
        elif _is_set("ACCELERATE_USE_FSDP"):
            options["fsdp_plugin"] = FullyShardedDataParallelPlugin()
        if engine == "zero2":
            options["deepspeed_plugin"] = DeepSpeedPlugin(
                hf_ds_config={
                    "zero_optimization": {
                        "stage": 2,
                        "offload_optimizer": {"device": "cpu" if offload else "none"},
                        # Values; at DeepSpeed's default such a buffer has 2 GB in float32.
                        "reduce_bucket_size": 50_000_000,
                    }
                }
            )
        # DeepSpeed finds out by itself that there is no GPU, and is left out if Accelerate is told.
        is_cpu = pick_device(device).type == "cpu" and not has_deepspeed
        accelerator = Accelerator(cpu=is_cpu, **options)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"Accelerate cannot do what the recipe or its configuration asks for: {error} train "
            f"runs with {_known()}; DeepSpeed comes with `pip install 'videorepa[deepspeed]'`."
        ) from None
    if accelerator.distributed_type == DistributedType.MULTI_CPU and "fsdp_plugin" in options:
        # Accelerate shards on GPUs, and forgets about it on CPUs, where it works as well.
        accelerator.state.distributed_type = DistributedType.FSDP
        accelerator.state.fsdp_plugin = options["fsdp_plugin"]
    return accelerator


def _is_set(variable: str) -> bool:
    """Whether `accelerate launch` has set a switch of its configuration."""
    return os.environ.get(variable, "false").lower() == "true"


def _engine(accelerator: Any, parallel: Parallel | None) -> type[Replicated]:
    """Which of ENGINES Accelerate was set up for."""
    state, found = accelerator.state, accelerator.distributed_type.value
    if found in ("MULTI_GPU", "MULTI_CPU"):
        found = Replicated.called
    elif found == "FSDP":
        found = f"FSDP{state.fsdp_plugin.fsdp_version}"
    elif found == "DEEPSPEED":
        found = f"DeepSpeed ZeRO-{state.deepspeed_plugin.zero_stage}"
    if accelerator.parallelism_config is not None:
        found += " with a parallelism_config"
    if state.dynamo_plugin.backend.value != "NO":
        found += " with torch.compile"
    engines = [name for name, engine in ENGINES.items() if engine.called == found]
    if not engines:
        raise UserError(
            f"The accelerate configuration asks for {found}; train runs with {_known()}. Change "
            "it, or set parallel.engine in the recipe and start train without it."
        )
    if parallel is not None and engines != [parallel.engine]:
        raise UserError(
            f"The recipe asks for parallel.engine {parallel.engine}, the accelerate configuration "
            f"for {found}. Leave one of them out."
        )
    return ENGINES[engines[0]]


def _known() -> str:
    *most, last = (engine.called for engine in ENGINES.values())
    return f"{', '.join(most)} or {last}"
