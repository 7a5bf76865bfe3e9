"""Compares the weights of a file with those that a model expects."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

NAMED = 8
"""Most names of each kind that a message lists."""


@dataclass(frozen=True)
class Misfit:
    """The weights that do not fit a model. It is true if there are any, and readable as text.

    Attributes:
      missing: Names that the model has and the file lacks.
      extra: Names that the file has and the model lacks.
      misshapen: Weights of another shape, each as "name (3, 2), expected (3, 4)".
    """

    missing: list[str]
    extra: list[str]
    misshapen: list[str]

    @classmethod
    def between(
        cls, weights: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]
    ) -> Misfit:
        """Compare weights with a model's shapes by name."""
        return cls(
            sorted(expected.keys() - weights.keys()),
            sorted(weights.keys() - expected.keys()),
            [
                _misshapen(name, tuple(weights[name].shape), shape)
                for name, shape in sorted(expected.items())
                if name in weights and tuple(weights[name].shape) != shape
            ],
        )

    @classmethod
    def reported(cls, info: Mapping[str, Any], unused: str = "") -> Misfit:
        """Read the loading info of a `from_pretrained` of transformers or diffusers.

        Args:
          info: What `output_loading_info=True` adds to the result.
          unused: Beginning of names that do not matter; "" for none.
        """

        def used(key: str) -> list[str]:
            return sorted(name for name in info[key] if not (unused and name.startswith(unused)))

        misshapen = sorted(_misshapen(*mismatch) for mismatch in info["mismatched_keys"])
        return cls(used("missing_keys"), used("unexpected_keys"), misshapen)

    def __bool__(self) -> bool:
        return bool(self.missing or self.extra or self.misshapen)

    def __str__(self) -> str:
        return "; ".join(
            f"{kind}: {', '.join(names[:NAMED])}"
            + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")
            for kind, names in vars(self).items()
            if names
        )


def shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """The shape of each tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in weights.items()}


def _misshapen(name: str, stored: tuple[int, ...], expected: tuple[int, ...]) -> str:
    return f"{name} {tuple(stored)}, expected {tuple(expected)}"
