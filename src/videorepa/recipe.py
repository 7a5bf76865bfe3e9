"""The recipe: one typed, frozen description of a whole run, read from and written to YAML.

A recipe is data. Nothing in it is ever executed; the names of plugins are names of files that are
already installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from videorepa.errors import UserError
from videorepa.settings import plugins
from videorepa.settings.fields import BackboneField, EncoderField, LossField, block_or
from videorepa.settings.section import SPELLINGS, Section, change, explain, read_values
from videorepa.settings.sections import (
    Data,
    Generation,
    Memory,
    Optim,
    Parallel,
    Train,
    Validation,
    When,
)


class Align(Section):
    """One alignment term: what is compared with what, how, when, and how much it counts.

    name: what the log calls it among several terms; by default its loss's name.
    loss: how the two grids are compared.
    block: the student's side: the transformer block whose output is tapped, counted from 1 as in
        the paper, or "clean", the clean latents that the model predicts.
    target: the other side: "encoder", the number of another block of the same model (LayerSync),
        or "latents", the clip's own (LaMo). Its gradient is cut off.
    encoder: this term's own teacher; by default the recipe's.
    teacher: "cached" reads features that `prepare` stored; "online" decodes the clip and runs the
        encoder at every step.
    weight: coefficient of the loss; 0 is plain fine-tuning through the same code, with the loss
        still measured and logged.
    when: the weight's course.
    projector: brings the student's tokens to the target's width: "mlp" as published, "conv" a 3x3
        convolution on each frame (iREPA), "none" where the widths are equal.
    hidden: width of the MLP's hidden layers.
    interpolate: the side that is brought to the other's grid: the student's, as published, or the
        teacher's, or the teacher's in one respect and the student's in the other.
    standardise: takes this share of their mean over each frame from the target's channels and
        divides by the standard deviation (iREPA's 0.6); None leaves them as they are.
    centre: takes from each place of both sides its mean there, over the batch ("clips"), so that
        what sets a clip apart is compared, or over the clip's own time ("time"), so that what
        changes is.
    """

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")
    loss: LossField = Field(default_factory=lambda: plugins.description("losses", "relation")())
    block: Annotated[int | Literal["clean"], block_or("clean")]
    target: Annotated[int | Literal["encoder", "latents"], block_or("encoder", "latents")] = (
        "encoder"
    )
    encoder: EncoderField | None = None
    teacher: Literal["cached", "online"] = "cached"
    weight: float = Field(default=0.5, ge=0.0)
    when: When = When()
    projector: Literal["mlp", "conv", "none"] = "mlp"
    hidden: int = Field(default=2048, ge=1)
    interpolate: Literal["student", "teacher", "teacher_in_space", "teacher_in_time"] = "student"
    standardise: float | None = Field(default=None, ge=0, le=1)
    centre: Literal["none", "clips", "time"] = "none"

    @model_validator(mode="after")
    def _sides_fit(self) -> Align:
        if self.encoder is not None and self.target != "encoder":
            raise ValueError("give `encoder` or another `target`, not both")
        if self.target == self.block:
            raise ValueError(f"block {self.block} cannot be its own target")
        return self

    @property
    def is_probe(self) -> bool:
        """Whether the term is measured only: the control of an aligned run."""
        return self.weight == 0


def _as_published(value: Any, info: ValidationInfo) -> Any:
    """Fills in what the recipe leaves out of `generation`."""
    backbone = info.data.get("backbone")
    return backbone.generation | value if backbone and isinstance(value, dict) else value


def _spelling(value: Any) -> str:
    return SPELLINGS[isinstance(value, (list, tuple))]


if TYPE_CHECKING:
    AlignField = Align | tuple[Align, ...]
else:
    AlignField = Annotated[
        Annotated[Align, Tag("one")]
        | Annotated[tuple[Align, ...], Field(min_length=1), Tag("many")],
        Discriminator(_spelling),
    ]


class Recipe(Section):
    """One run, whole: `Recipe.from_yaml(path)`, and back with `.to_yaml(path)`.

    encoder: the teacher of all alignment terms that name none of their own.
    align: an alignment term, a list of them, or nothing for a training without alignment.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    about: str = ""
    seed: int = Field(default=0, ge=0)
    backbone: BackboneField
    encoder: EncoderField | None = None
    align: AlignField | None = None
    data: Data
    optim: Optim
    train: Train = Train()
    memory: Memory = Memory()
    parallel: Parallel | None = None
    generation: Annotated[Generation, BeforeValidator(_as_published)] = Field(
        default_factory=dict, validate_default=True
    )
    validation: Validation | None = None

    @model_validator(mode="after")
    def _teacher_and_alignment(self) -> Recipe:
        taught = [term for term in self._listed if term.target == "encoder"]
        if any(term.encoder is None for term in taught) and self.encoder is None:
            raise ValueError("an alignment with an encoder needs `encoder`, and there is none")
        if self.encoder is not None and all(term.encoder is not None for term in taught):
            raise ValueError("`encoder` is given and no `align` uses it: give both, or neither")
        # A teacher brings its own defaults. They become part of the recipe here, once, so that
        # what is written into a run says them.
        resolved = tuple(
            term.model_copy(update={"loss": term.loss.taught_by(term.encoder or self.encoder)})
            for term in self._listed
        )
        if self.align is not None:
            align = resolved if isinstance(self.align, tuple) else resolved[0]
            object.__setattr__(self, "align", align)
        return self

    @model_validator(mode="after")
    def _centred_batches_have_others(self) -> Recipe:
        if self.optim.batch_size < 2 and any(term.centre == "clips" for term in self._listed):
            raise ValueError(
                "align.centre: clips takes the batch's mean away, and optim.batch_size 1 leaves "
                "nothing; give 2 or more, better 8"
            )
        return self

    @model_validator(mode="after")
    def _memory_fits_the_training(self) -> Recipe:
        memory = self.memory
        if self.train.lora is None and (memory.frozen != "float32" or memory.offload != "none"):
            raise ValueError(
                "memory.frozen and memory.offload are for the frozen weights under `train.lora`; "
                "without it all weights are trained, and those stay in float32"
            )
        if self.parallel is not None and self.parallel.engine != "ddp":
            chosen = (memory.is_quantised, memory.optimizer != "adamw", memory.offload != "none")
            if any(chosen):
                raise ValueError(
                    f"{self.parallel.engine} shares out plain tensors: memory.frozen int8 and nf4, "
                    "memory.optimizer adamw8bit and memory.offload go with ddp or one process"
                )
        return self

    @property
    def _listed(self) -> tuple[Align, ...]:
        if self.align is None:
            return ()
        return self.align if isinstance(self.align, tuple) else (self.align,)

    @property
    def terms(self) -> dict[str, Align]:
        """The alignment terms by name, each with its encoder filled in."""
        terms: dict[str, Align] = {}
        for term in self._listed:
            name = wanted = term.name or term.loss.name
            number = 1
            while name in terms:
                number += 1
                name = f"{wanted}-{number}"
            encoder = term.encoder or self.encoder if term.target == "encoder" else None
            terms[name] = term.model_copy(update={"encoder": encoder})
        return terms

    @property
    def stored_encoders(self) -> tuple[EncoderField, ...]:
        """The encoders whose features `prepare` stores, each once."""
        found = (t.encoder for t in self.terms.values() if t.teacher == "cached" and t.encoder)
        return tuple(dict.fromkeys(found))

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe. Overrides are `dotted.key=value`, with the value in YAML.

        Raises UserError that names the file, the key and what was expected there.
        """
        return cls.parse(read_values(Path(path), overrides), source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "recipe") -> Recipe:
        """Check plain values. Raises UserError with every fault on a line of its own."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(
                f"{source} is not a recipe:\n" + "\n".join(explain(error, cls))
            ) from None

    def override(self, *overrides: str) -> Recipe:
        """A copy with some keys changed, each `dotted.key=value`."""
        values = self.model_dump(mode="json")
        for override in overrides:
            change(values, override)
        return self.parse(values)

    def text(self) -> str:
        """The recipe as YAML, defaults and all."""
        values = self.model_dump(mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def to_yaml(self, path: Path | str) -> None:
        """Write it, atomically."""
        from videorepa.system.files import atomic_write

        atomic_write(Path(path), self.text())
