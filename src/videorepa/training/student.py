"""The trained model: a diffusion transformer with its alignment terms, in one forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from videorepa.align.gradients import Aligned
from videorepa.align.terms import Terms
from videorepa.data.batches import Batch
from videorepa.diffusion import Denoised
from videorepa.recipe import Recipe
from videorepa.system.device import autocast, compute_dtype
from videorepa.system.randomness import step_seed
from videorepa.training.checkpointing import checkpoint_blocks
from videorepa.training.memory import load_transformer
from videorepa.training.parallel import Sharing
from videorepa.training.precision import convert_no_inputs, kept_in_float32
from videorepa.training.speed import choose_attention, compile_blocks


class Student(nn.Module):
    """The backbone's transformer, as a recipe trains it, and the projectors beside it.

    Args:
      recipe: Describes the training.
      device: On the meta device nothing is read, and weights have shapes alone.
      dtype: To compute in; by default as the recipe and the device decide.
      home: Where the transformer waits until it runs or is shared; by default on the device.

    Raises:
      UserError: The weights cannot be loaded, or held as the recipe says.
    """

    def __init__(
        self,
        recipe: Recipe,
        device: torch.device,
        dtype: torch.dtype | None = None,
        home: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.recipe, self.device = recipe, device
        self.dtype = dtype or compute_dtype(recipe.train.precision, device)
        home = home or device
        self.backbone = load_transformer(recipe, device, self.dtype, home)
        self.transformer = transformer = self.backbone.transformer
        transformer.train()
        if recipe.memory.gradient_checkpointing:
            checkpoint_blocks(self.backbone, recipe.memory, device)
        if recipe.speed.attention is not None:
            choose_attention(self.backbone, recipe.speed.attention, device, self.dtype)

        torch.manual_seed(step_seed(recipe.seed, -1))
        if recipe.train.lora is None:
            transformer.requires_grad_(True)
        else:
            recipe.backbone.add_lora(transformer, recipe.train.lora)
            for parameter in transformer.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.to(home, torch.float32)
            convert_no_inputs(transformer)
        if recipe.speed.compile and device.type != "meta":
            compile_blocks(self.backbone)
        self.terms = Terms(recipe, recipe.backbone.shapes(recipe.data)).to(device)

    def forward(self, step: int, batch: Batch) -> tuple[Denoised, Aligned]:
        """Compute both losses of a micro-batch; the transformer runs once."""
        frames = self.recipe.data.frames
        with autocast(self.device, self.dtype):
            denoised = self.backbone.denoising_loss(
                batch.latents, batch.text, batch.noise, batch.timestep, batch.opening
            )
            aligned = self.terms(
                step,
                self.backbone,
                batch.latents,
                denoised,
                batch.teachers,
                frames,
                batch.opening,
            )
        return denoised, aligned

    @contextmanager
    def tapped(self) -> Iterator[None]:
        """Keep the outputs of the blocks that the terms compare, while the context is open."""
        with self.terms.tapped(self.backbone):
            yield

    @property
    def trained(self) -> dict[str, Tensor]:
        """The transformer's trained parameters by name."""
        return {k: p for k, p in self.transformer.named_parameters() if p.requires_grad}

    def sharing(self) -> Sharing:
        """What processes have to know to share the training."""
        count = self.recipe.backbone.shapes(self.recipe.data).blocks
        blocks = {type(self.backbone.block(number + 1)).__name__ for number in range(count)}
        # Autocast would convert weights to the dtype that it computes in anyway. Where the stock
        # class keeps some in float32, all stay so. Beside an adapter's, most are smaller already.
        is_plain = self.recipe.train.lora is None and not kept_in_float32(self.transformer)
        return Sharing(
            together=blocks | {type(self.transformer).__name__},
            gathered_in=self.dtype if is_plain and self.dtype != torch.float32 else None,
            lacks_gradients=self._lacks_gradients(),
        )

    def _lacks_gradients(self) -> bool:
        idle = any(part in name for name in self.trained for part in self.recipe.backbone.idle)
        # The projector of a term that has ended gets none.
        rules = [term.when for term in self.recipe.terms.values()]
        return idle or any(when.until or when.opposed for when in rules)
