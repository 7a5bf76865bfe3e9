"""The recipe: one typed, frozen description of a whole run, read from and written to YAML.

A recipe is data. Nothing in it is ever executed. The plugins that it names are files that are
already installed.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    Discriminator,
    Field,
    Tag,
    ValidationInfo,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from videorepa.conditioning import possible
from videorepa.errors import UserError
from videorepa.settings import plugins
from videorepa.settings.bounds import Count, Seed, Share, Width
from videorepa.settings.fields import BackboneField, EncoderField, LossField, block_or
from videorepa.settings.reading import MOST_CHARACTERS
from videorepa.settings.section import Section, change, read_values, spelling
from videorepa.settings.sections import (
    Data,
    Generation,
    Memory,
    Optim,
    Parallel,
    Speed,
    Train,
    Validation,
    When,
)
from videorepa.system.files import atomic_write


class Align(Section):
    """One alignment term: what is compared with what, how, when, and how much it counts.

    Attributes:
      name: Name of the term in the log; by default its loss's name.
      loss: How the two grids are compared.
      block: The student's side: the transformer block whose output is tapped, counted from 1 as in
        the paper, or "clean", the clean latents that the model predicts.
      target: The other side: "encoder", the number of another block of the same model (LayerSync),
        or "latents", the clip's own (LaMo). No gradient flows into it.
      encoder: The teacher of this term; by default the recipe's.
      teacher: "cached" reads features that `prepare` stored; "online" decodes the clip and runs the
        encoder at every step.
      weight: Coefficient of the loss. With 0 the same code does plain fine-tuning, and still
        measures and logs the loss.
      when: How the weight changes over the training and with the noise level.
      projector: Brings the student's tokens to the target's width: "mlp" as published, "conv" by a
        3x3 convolution on each frame (iREPA), "none" not at all: tokens are interpolated alone.
        Relation losses take any widths, losses that compare token by token need equal ones.
      hidden: Width of the MLP's hidden layers.
      interpolate: The side that is brought to the other's grid: the student's, as published; the
        teacher's; or the teacher's in space or time and the student's in the other.
      standardise: Subtracts this share of each channel's mean over a frame from the target, and
        divides by the standard deviation (0.6 in iREPA). None leaves the target as it is.
      centre: Subtracts from each token of both sides the mean of its place. A mean over the batch
        ("clips") leaves what sets a clip apart, and one over the clip's own time ("time") leaves
        what changes.
      ahead: Steps of the common grid by which the target is later than the student. The student's
        early steps then predict what the teacher sees afterwards, and its last ones are not
        compared.
    """

    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]{0,39}$")
    loss: LossField = Field(
        default_factory=lambda: plugins.description("losses", "relation")(name="relation")
    )
    block: Annotated[int | Literal["clean"], block_or("clean")]
    target: Annotated[int | Literal["encoder", "latents"], block_or("encoder", "latents")] = (
        "encoder"
    )
    encoder: EncoderField | None = None
    teacher: Literal["cached", "online"] = "cached"
    weight: float = Field(default=0.5, ge=0.0)
    when: When = When()
    projector: Literal["mlp", "conv", "none"] = "mlp"
    hidden: Width = 2048
    interpolate: Literal["student", "teacher", "teacher_in_space", "teacher_in_time"] = "student"
    standardise: Share | None = None
    centre: Literal["none", "clips", "time"] = "none"
    ahead: Count = 0

    @model_validator(mode="after")
    def _sides_fit(self) -> Align:
        if self.encoder is not None and self.target != "encoder":
            raise ValueError("give `encoder` or another `target`, not both")
        if self.target == self.block:
            raise ValueError(f"block {self.block} cannot be its own target")
        return self

    @property
    def is_probe(self) -> bool:
        """Whether the term is only measured, as in the control of an aligned run."""
        return self.weight == 0


def _as_published(
    value: Any, check: ValidatorFunctionWrapHandler, info: ValidationInfo
) -> Generation:
    """Fill in the backbone's published values where `generation` leaves them out."""
    generation, backbone = check(value), info.data.get("backbone")
    given = generation.model_dump(exclude_unset=True)
    # A run's recipe has them all, and can be read where the backbone's folder is gone or damaged.
    if not backbone or given.keys() == {*Generation.model_fields}:
        return generation
    published = check(backbone.published_generation() | given)
    return generation.derived(**published.model_dump(exclude={*given}))


if TYPE_CHECKING:
    AlignField = Align | tuple[Align, ...]
else:
    AlignField = Annotated[
        Annotated[Align, Tag("one")]
        | Annotated[tuple[Align, ...], Field(min_length=1), Tag("many")],
        Discriminator(spelling),
    ]


class Recipe(Section):
    """The description of a whole run, read by `Recipe.from_yaml` and written by `to_yaml`.

    Attributes:
      about: A remark on what the recipe is for.
      encoder: The teacher of all alignment terms that name none of their own.
      align: An alignment term, a list of them, or None for a training without alignment.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    about: str = ""
    seed: Seed = 0
    backbone: BackboneField
    encoder: EncoderField | None = None
    align: AlignField | None = None
    data: Data
    optim: Optim
    train: Train = Train()
    memory: Memory = Memory()
    speed: Speed = Speed()
    parallel: Parallel | None = None
    generation: Annotated[Generation, WrapValidator(_as_published)] = Field(
        default_factory=Generation, validate_default=True
    )
    validation: Validation | None = None

    @model_validator(mode="after")
    def _teacher_and_alignment(self) -> Recipe:
        taught = [term for term in self._listed if term.target == "encoder"]
        if any(term.encoder is None for term in taught) and self.encoder is None:
            raise ValueError("an alignment with an encoder needs `encoder`, and there is none")
        if self.encoder is not None and all(term.encoder is not None for term in taught):
            raise ValueError("`encoder` is set and no `align` uses it: give both, or neither")
        # A teacher brings its own defaults. They become part of the recipe here, once, so that
        # a run's recipe states them.
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
                "align.centre: clips subtracts the batch's mean, and optim.batch_size 1 leaves "
                "nothing; give 2 or more, better 8"
            )
        return self

    @model_validator(mode="after")
    def _memory_fits_the_training(self) -> Recipe:
        memory = self.memory
        if self.train.lora is None and memory.frozen == "auto":
            memory = memory.derived(frozen="float32")
            object.__setattr__(self, "memory", memory)
        if self.train.lora is None and (memory.frozen != "float32" or memory.offload != "none"):
            raise ValueError(
                "memory.frozen and memory.offload are for the frozen weights under `train.lora`; "
                "without it all weights are trained, and those stay in float32"
            )
        needs_whole_weights = (
            memory.is_quantised or memory.optimizer != "adamw" or memory.offload != "none"
        )
        if self.parallel is not None and self.parallel.engine != "ddp" and needs_whole_weights:
            raise ValueError(
                f"{self.parallel.engine} shards plain tensors alone: memory.frozen int8 and nf4, "
                "memory.optimizer adamw8bit and memory.offload need ddp or one process"
            )
        return self

    @model_validator(mode="after")
    def _compiled_blocks_have_all_tokens(self) -> Recipe:
        if self.speed.compile and self.parallel is not None and self.parallel.context > 1:
            raise ValueError("speed.compile does not go with a parallel.context of more than 1")
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
    def mixes_samples(self) -> bool:
        """Whether the loss of a sample, or what is drawn for it, depends on others of its pass."""
        conditioning = self.backbone.conditioning()
        shown = possible(self.backbone.continuation(self.data))
        is_alike = conditioning is not None and conditioning.is_alike and len(shown) > 1
        return is_alike or any(term.centre == "clips" for term in self._listed)

    @property
    def aligned_blocks(self) -> list[int]:
        """Numbers of the blocks that are tapped, in order."""
        return sorted({term.block for term in self._listed if isinstance(term.block, int)})

    @property
    def teachers(self) -> tuple[EncoderField, ...]:
        """The encoders of all terms, each once: the recipe's first."""
        named = (self.encoder, *(term.encoder for term in self.terms.values()))
        return tuple(dict.fromkeys(encoder for encoder in named if encoder is not None))

    @property
    def stored_encoders(self) -> tuple[EncoderField, ...]:
        """The encoders whose features `prepare` stores, each once."""
        encoders = (t.encoder for t in self.terms.values() if t.teacher == "cached" and t.encoder)
        return tuple(dict.fromkeys(encoders))

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe from a YAML file.

        Args:
          path: The file.
          overrides: Keys to change, each `dotted.key=value` with the value in YAML.

        Raises:
          UserError: The file is not a recipe; the message names the file and each faulty key.
        """
        return cls.parse(read_values(Path(path), overrides), source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "recipe") -> Recipe:
        """Make a recipe of plain values. Raises UserError with each fault on a line of its own."""
        return cls.checked(values, f"{source} is not a recipe")

    def override(self, *overrides: str) -> Recipe:
        """Make a copy with some keys changed, each `dotted.key=value`.

        It is the recipe that its file would give with these changes: what was left open, such as a
        margin that goes with the encoder, is filled in anew.

        Raises:
          UserError: The result is no recipe.
        """
        values = self.model_dump(mode="json", exclude_unset=True)
        for override in overrides:
            change(values, override)
        return self.parse(values)

    def text(self) -> str:
        """Write the recipe as YAML, defaults included."""
        values = self.model_dump(mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def to_yaml(self, path: Path | str) -> None:
        """Write the recipe to a file, atomically.

        Raises:
          UserError: With its defaults it is too long to be read again.
          OSError: The disk refuses.
        """
        text = self.text()
        if len(text) > MOST_CHARACTERS:
            raise UserError(
                f"The recipe {self.name} has {len(text):,} characters with its defaults; recipes "
                f"have at most {MOST_CHARACTERS:,}. Shorten its prompts."
            )
        atomic_write(Path(path), text)
