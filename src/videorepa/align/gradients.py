"""Measures each term's gradient where it reads the student, while the backward pass runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
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
    """A term's gradient and the denoising loss's, where the term reads; 0 until they have passed.

    It holds no part of the graph, which lives no longer for it.
    """

    def __init__(self, like: Tensor) -> None:
        self._of_term: Tensor | None = None
        self._align = self._denoise = self._cosine = like.new_zeros(())

    def measured(self) -> dict[str, Tensor]:
        """Give the norms of the term's gradient and of the rest, and the cosine of the two."""
        return {
            "grad_align": self._align,
            "grad_denoise": self._denoise,
            "grad_cosine": self._cosine,
        }

    def _keep(self, gradient: Tensor) -> None:
        self._of_term = gradient

    def _take(self, slope: Tensor | float) -> Tensor | None:
        of_term, self._of_term = self._of_term, None
        return None if of_term is None else of_term.float() * slope

    def _measure(self, of_term: Tensor | None, rest: Tensor) -> None:
        if of_term is not None:
            self._align = of_term.norm()
            self._cosine = nn.functional.cosine_similarity(of_term.flatten(), rest.flatten(), dim=0)
        self._denoise = rest.norm()


class Junction:
    """A tensor that terms read and that the denoising loss depends on, where their gradients meet.

    Each term reads it through a branch of its own, which separates its gradient from the rest of
    what arrives, in the one backward pass. The rest is the gradient of the denoising loss, and of
    terms that read deeper blocks. A learnable projector can absorb all of the alignment's
    gradient; this makes that visible.

    Args:
      output: A block's output: the video's tokens, or a tuple that begins with them.
      gathering: The processes that share the tokens; terms read those of all.
      source: What both the loss and `output` are computed from, where the loss does not go through
        `output`; the gradients are measured there.
      slope: The derivative of each number in `output` by the one in its place in `source`.
    """

    def __init__(
        self,
        output: Any,
        gathering: Gathering,
        source: Tensor | None = None,
        slope: Tensor | float = 1.0,
    ) -> None:
        self._gathering = gathering
        is_tuple = isinstance(output, tuple)
        self._tokens, self._others = (output[0], output[1:]) if is_tuple else (output, None)
        self._branches: list[Gradients] = []
        at: Tensor = self._tokens if source is None else source
        if at.requires_grad:
            at.register_hook(partial(_split, self._branches, gathering, slope))

    def branch(self, detach: bool) -> tuple[Any, Gradients]:
        """Give the output for one more term to read, and the gradients to be measured.

        Args:
          detach: Cut the branch off, so that no gradient of the term reaches the tokens.
        """
        gradients, tokens = Gradients(self._tokens), self._tokens
        self._branches.append(gradients)
        branch = self._gathering.whole(tokens.detach() if detach else tokens.view_as(tokens))
        if branch.requires_grad:
            branch.register_hook(gradients._keep)
        return branch if self._others is None else (branch, *self._others), gradients


def _split(
    branches: Sequence[Gradients], gathering: Gathering, slope: Tensor | float, gradient: Tensor
) -> None:
    """Take the terms' gradients from what has arrived, and measure each against the rest."""
    rest = gathering.gradient(gradient.float())
    of_terms = [branch._take(slope) for branch in branches]
    for of_term in of_terms:
        if of_term is not None:
            rest = rest - of_term
    for branch, of_term in zip(branches, of_terms, strict=True):
        branch._measure(of_term, rest)
