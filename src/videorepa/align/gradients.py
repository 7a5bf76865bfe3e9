"""Measures each term's gradient at the tapped block while the backward pass runs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn


class Part(NamedTuple):
    """One term at one batch."""

    suffix: str
    weight: float
    loss: Tensor
    similarity: Tensor
    gradients: Gradients


class Aligned(NamedTuple):
    """The terms at one batch; what is logged of the gradients is known after the backward pass.

    It is a tuple so that DDP and FSDP2 find the tensors that the backward pass begins with.
    """

    parts: list[Part]

    @property
    def loss(self) -> Tensor | float:
        """What goes backward. A probe's graph is cut off, so that its weight here is free."""
        return sum((part.weight or 1.0) * part.loss for part in self.parts)

    @property
    def losses(self) -> dict[str, Tensor]:
        """Unweighted, by name."""
        return {f"align{part.suffix}": part.loss for part in self.parts}

    @property
    def counted(self) -> float:
        """The terms' share of the training's loss."""
        return sum(part.weight * part.loss.item() for part in self.parts)

    def read(self) -> dict[str, float]:
        """What is logged, for each term under its own name."""
        return {
            key + part.suffix: value
            for part in self.parts
            for key, value in {
                "align": part.loss.item(),
                "align_weight": part.weight,
                "similarity": part.similarity.item(),
                **part.gradients.read(),
            }.items()
        }


class Gradients:
    """Measures, while the one backward pass runs, what each loss's gradient is at the tap.

    The term's part arrives through a branch of its own; the rest of what arrives at the tapped
    tokens is the diffusion loss's (and that of terms that tap deeper). A learnable projector can
    absorb all of the alignment's gradient, which this makes visible.
    """

    def __init__(self, output: Any, detach: bool) -> None:
        self._align = self._denoise = self._cosine = 0.0
        self._arrived: Tensor | None = None
        # Blocks give a tensor, or a tuple that begins with the video's tokens.
        tokens, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        branch = tokens.detach() if detach else tokens.view_as(tokens)
        if branch.requires_grad:
            branch.register_hook(self._from_branch)
        if tokens.requires_grad:
            tokens.register_hook(self._from_all)
        self.branch = branch if rest is None else (branch, *rest)

    def _from_branch(self, gradient: Tensor) -> None:
        self._arrived = gradient

    def _from_all(self, gradient: Tensor) -> None:
        rest = gradient.float()
        if self._arrived is not None:
            ours, self._arrived = self._arrived.float(), None
            rest = rest - ours
            self._align = ours.norm().item()
            self._cosine = nn.functional.cosine_similarity(
                ours.flatten(), rest.flatten(), dim=0
            ).item()
        self._denoise = rest.norm().item()

    def read(self) -> dict[str, float]:
        return {
            "grad_align": self._align,
            "grad_denoise": self._denoise,
            "grad_cosine": self._cosine,
        }
