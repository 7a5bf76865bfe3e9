"""Measures each term's gradient at the tapped block while the backward pass runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from videorepa.align.gathering import Gathering


class TermResult(NamedTuple):
    """The result of one alignment term for one batch.

    Attributes:
      suffix: Added to the names of the logged values: "" for a single term, else ".name".
      weight: The term's coefficient at this step; 0 for a probe.
      loss: The unweighted loss, a scalar.
      similarity: The mean-centred similarity of the two sides, a scalar.
      gradients: The term's gradients; complete once the backward pass has ended.
    """

    suffix: str
    weight: float
    loss: Tensor
    similarity: Tensor
    gradients: Gradients


class Aligned(NamedTuple):
    """The results of all terms for one batch.

    It is a tuple so that DDP and FSDP2 find the tensors that the backward pass begins with.
    """

    terms: list[TermResult]

    @property
    def loss(self) -> Tensor | float:
        """The loss to add to the denoising loss; 0 without terms.

        A probe enters with weight 1: its graph is cut off from the transformer.
        """
        return sum(((term.weight or 1.0) * term.loss for term in self.terms), 0.0)

    @property
    def losses(self) -> dict[str, Tensor]:
        """The unweighted losses by the names that the log gives them."""
        return {f"align{term.suffix}": term.loss for term in self.terms}

    @property
    def weights(self) -> dict[str, float]:
        """The terms' weights by the names that the log gives them; 0 for probes."""
        return {f"align_weight{term.suffix}": term.weight for term in self.terms}

    def weighted(self, values: Mapping[str, float]) -> float:
        """Add up the loss of logged values: the denoising loss and the weighted terms."""
        terms = (term.weight * values[f"align{term.suffix}"] for term in self.terms)
        return values["denoise"] + sum(terms, 0.0)

    def measured(self) -> dict[str, Tensor]:
        """Give the values to log, after the backward pass, as scalars on the device."""
        return {
            key + term.suffix: value.detach()
            for term in self.terms
            for key, value in {
                "align": term.loss,
                "similarity": term.similarity,
                **term.gradients.measured(),
            }.items()
        }


class Gradients:
    """Measures the gradients of both losses at the tapped tokens, in the one backward pass.

    The term reads the tokens through `branch`, which separates its gradient from the rest of what
    arrives at the tokens: the gradients of the denoising loss and of terms that tap deeper blocks.
    A learnable projector can absorb all of the alignment's gradient; this makes that visible.

    Args:
      output: A block's output: the video's tokens, or a tuple that begins with them.
      detach: Cut the branch off, so that no gradient of the term reaches the tokens.
      gathering: The processes that share the tokens; the term reads those of all.

    Attributes:
      branch: The output that the term reads.
    """

    def __init__(self, output: Any, detach: bool, gathering: Gathering) -> None:
        self._gathering = gathering
        self._from_term: Tensor | None = None
        tokens, rest = (output[0], output[1:]) if isinstance(output, tuple) else (output, None)
        self._align = self._denoise = self._cosine = tokens.new_zeros(())
        branch = gathering.whole(tokens.detach() if detach else tokens.view_as(tokens))
        if branch.requires_grad:
            branch.register_hook(self._at_branch)
        if tokens.requires_grad:
            tokens.register_hook(self._at_tokens)
        self.branch = branch if rest is None else (branch, *rest)

    def _at_branch(self, gradient: Tensor) -> None:
        self._from_term = gradient

    def _at_tokens(self, gradient: Tensor) -> None:
        rest = self._gathering.gradient(gradient.float())
        if self._from_term is not None:
            of_term, self._from_term = self._from_term.float(), None
            rest = rest - of_term
            self._align = of_term.norm()
            self._cosine = nn.functional.cosine_similarity(of_term.flatten(), rest.flatten(), dim=0)
        self._denoise = rest.norm()

    def measured(self) -> dict[str, Tensor]:
        """Give the norms of the term's gradient and of the rest, and the cosine of the two."""
        return {
            "grad_align": self._align,
            "grad_denoise": self._denoise,
            "grad_cosine": self._cosine,
        }
