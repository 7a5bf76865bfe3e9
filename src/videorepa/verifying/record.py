"""The record of a verification: what was compared, what came out, and figures to compare with."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from videorepa.errors import UserError
from videorepa.system.files import atomic_write, parse_json, read_text
from videorepa.system.wording import listed, shown
from videorepa.verifying.files import Kept, ReadWeights

FORMAT = 1

Status = Literal["ok", "fails", "doubtful", "open"]

WORDS = {"ok": "ok", "fails": "FAILS", "doubtful": "doubtful", "open": "not told"}

TOLERANCES = {"float32": 1e-4, "bfloat16": 2e-2}
"""Largest relative difference between two ways of computing the same, by the dtype."""

ELSEWHERE = 5.0
"""How many times as far figures of another machine or version may be apart."""

NAMED = 8
"""Most names that a check lists."""


@dataclass(frozen=True)
class Finding:
    """One comparison.

    Attributes:
      name: The part, and what of it was compared.
      status: "doubtful" is unlike trained weights; "open" could not be told.
      words: What was found.
    """

    name: str
    status: Status
    words: str

    def __str__(self) -> str:
        return f"{WORDS[self.status]:<9} {self.name:<34} {self.words}"


@dataclass
class Verification:
    """What `verify` found; as text, a table.

    Attributes:
      recipe: The recipe's name.
      made: Versions and machine.
      device: Where the models ran.
      dtype: What they computed in.
      weights: The weights that were read, by part; a record that was read has none.
      kept: What the record keeps of them.
      checks: The comparisons, in order.
      figures: Numbers that another machine should get from the same weights, by what they are of:
        the root mean square of a tensor, and its product with fixed noise.
      measured: Seconds and bytes of the training step, and what was predicted.
    """

    recipe: str
    made: dict[str, Any]
    device: str
    dtype: str
    weights: dict[str, ReadWeights] = field(default_factory=dict)
    kept: dict[str, Kept] = field(default_factory=dict)
    checks: list[Finding] = field(default_factory=list)
    figures: dict[str, list[float]] = field(default_factory=dict)
    measured: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join(map(str, self.checks))

    @property
    def failed(self) -> list[Finding]:
        """The checks that failed."""
        return [check for check in self.checks if check.status == "fails"]

    @property
    def tolerance(self) -> float:
        """The largest relative difference that counts as equal here."""
        return TOLERANCES[self.dtype]

    def add(self, name: str, status: Status, words: str) -> None:
        self.checks.append(Finding(name, status, words))

    def compare(
        self, name: str, pairs: Mapping[str, tuple[Any, Any]], allowed: float = 0.0
    ) -> None:
        """Compare what we have with what stock classes have: one check, or one for each that fails.

        Args:
          name: What is compared.
          pairs: Our value and the stock one, by name.
          allowed: The relative difference that counts as equal, if it is more than `tolerance`.
        """
        allowed = max(allowed, self.tolerance)
        apart = {key: difference(ours, theirs) for key, (ours, theirs) in pairs.items()}
        wrong = {key: value for key, value in apart.items() if not value <= allowed}
        for key, value in wrong.items():
            words = f"is not the stock one: relative difference {value:.1e}, at most {allowed:.0e}"
            self.add(f"{name} {key}".strip(), "fails", words)
        if not wrong:
            most = max(apart.values(), default=0.0)
            equal = (
                f"{len(apart)} equal the stock ones" if len(apart) > 1 else "equals the stock one"
            )
            self.add(name, "ok", f"{equal}, to {most:.1e}")

    def keep(self, name: str, tensor: Tensor) -> None:
        """Keep figures of a tensor, and check that it is finite."""
        values = tensor.detach().float().cpu().flatten()
        if not values.isfinite().all():
            self.add(name, "fails", "has values that are not finite")
            return
        noise = torch.randn(len(values), generator=torch.Generator().manual_seed(0))
        numbers = values.square().mean().sqrt(), values @ noise / len(values) ** 0.5
        self.figures[name] = [float(f"{number.item():.6g}") for number in numbers]

    def write(self, path: Path) -> None:
        """Write the record as JSON. Raises OSError."""
        content = {
            "format": FORMAT,
            "recipe": self.recipe,
            "made": self.made,
            "device": self.device,
            "dtype": self.dtype,
            "checks": [[*vars(check).values()] for check in self.checks],
            "measured": self.measured,
            "figures": self.figures,
            "kept": {name: vars(kept) for name, kept in self.kept.items()},
        }
        # A line for each entry: short, and still to be compared line by line.
        lines = (f"{json.dumps(key)}: {_lines(value)}" for key, value in content.items())
        atomic_write(path, "{\n" + ",\n".join(lines) + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> Verification:
        """Read what `write` wrote.

        Raises:
          UserError: The file is no such record.
        """
        try:
            content = parse_json(read_text(path))
            if content.pop("format") != FORMAT:
                raise ValueError("it is of another format")
            content["checks"] = [Finding(*check) for check in content["checks"]]
            content["kept"] = {part: Kept(**kept) for part, kept in content["kept"].items()}
            return cls(**content)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise UserError(
                f"{path} is no record of `videorepa verify`: {type(error).__name__}: {error}."
            ) from None

    def compare_with(self, reference: Verification) -> None:
        """Compare weights, configurations and figures with an earlier record's."""
        for part, own in self.weights.items():
            name, other = f"reference: {part}", reference.kept.get(part)
            if other is None:
                self.add(name, "open", "the reference has no such part")
                continue
            self._compare_configurations(name, own.config, other.config)
            differing = other.others(own)
            if differing is None:
                self.add(name, "fails", "its tensors have other names than the reference's")
            elif differing:
                words = (
                    f"{len(differing)} of {len(own.tensors)} tensors differ from the reference: "
                )
                self.add(name, "fails", words + names(differing))
            else:
                self.add(name, "ok", "every tensor equals the reference's")
        self._compare_figures(reference)

    def _compare_configurations(
        self, name: str, own: Mapping[str, Any], other: Mapping[str, Any]
    ) -> None:
        for key in sorted(own.keys() | other.keys()):
            if own.get(key) != other.get(key):
                self.add(
                    f"{name} {key}",
                    "fails",
                    f"is {shown(own.get(key))}; the reference has {shown(other.get(key))}",
                )

    def _compare_figures(self, reference: Verification) -> None:
        allowed = ELSEWHERE * max(self.tolerance, reference.tolerance)
        shared = [name for name in self.figures if name in reference.figures]
        wrong = []
        for name in shared:
            (own, own_product), (other, product) = self.figures[name], reference.figures[name]
            apart = max(abs(own - other), abs(own_product - product)) / max(other, 1e-30)
            if not apart <= allowed:
                wrong.append(name)
                self.add(
                    f"reference: {name}",
                    "fails",
                    f"differs from the reference by {apart:.1e}, at most {allowed:.0e} is allowed",
                )
        if shared and not wrong:
            self.add("reference: figures", "ok", f"{len(shared)} agree to {allowed:.0e}")
        if not shared:
            self.add("reference: figures", "open", "none are in both records")


def difference(ours: Any, theirs: Any) -> float:
    """The relative difference of two tensors, of two groups of tensors, or of two values."""
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        if ours.shape != theirs.shape:
            return float("inf")
        a, b = ours.detach().float().cpu(), theirs.detach().float().cpu()
        return ((a - b).norm() / b.norm().clamp_min(1e-12)).item()
    if isinstance(ours, (tuple, list)) and isinstance(theirs, (tuple, list)):
        if len(ours) != len(theirs):
            return float("inf")
        return max((difference(*pair) for pair in zip(ours, theirs, strict=True)), default=0.0)
    return 0.0 if ours == theirs else float("inf")


def names(values: Iterable[str]) -> str:
    """List names, the first few of many."""
    every = list(values)
    more = [f"{len(every) - NAMED} more"] if len(every) > NAMED else []
    return listed([*every[:NAMED], *more])


def _lines(value: Any) -> str:
    if isinstance(value, dict) and value:
        return (
            "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items()) + "}"
        )
    if isinstance(value, list) and value:
        return "[\n" + ",\n".join(f" {json.dumps(v)}" for v in value) + "]"
    return json.dumps(value)
