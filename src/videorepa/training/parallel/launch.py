"""One process or many: what a training needs of Hugging Face Accelerate, and nothing more."""

from __future__ import annotations

import os
from typing import Any

from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.settings.sections import Parallel
from videorepa.system.device import pick_device
from videorepa.system.progress import console
from videorepa.training.parallel.workers import Alone, Replicated, Sharded
from videorepa.training.parallel.zero2 import Partitioned

ENGINES: dict[str, type[Replicated]] = {
    "ddp": Replicated,
    "fsdp2": Sharded,
    "zero2": Partitioned,
}
"""What several processes can share a training with, by `parallel.engine`."""


def join_workers(recipe: Recipe, device: str | None) -> Alone:
    """This process's join_workers among those that train.

    Raises UserError if the launcher and the recipe ask for different things, or for what is not
    there.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        accelerator = make_accelerator(recipe, device)
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


def make_accelerator(recipe: Recipe, device: str | None) -> Any:
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
