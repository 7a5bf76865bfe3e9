"""Shares a training by DeepSpeed's ZeRO-2."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from videorepa.training.parallel.workers import Replicated, State


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
