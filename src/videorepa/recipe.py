"""The recipe: one typed, frozen description of a whole run, read from and written to YAML.

A recipe is data. Nothing in it is ever executed; the names of plugins are names of files that are
already installed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PlainValidator,
    SerializeAsAny,
    Tag,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from videorepa import plugins
from videorepa.errors import UserError
from videorepa.section import SPELLINGS, Section, change, explain, read_values


def _described_by(kind: str) -> BeforeValidator:
    """Turns `{name: ..., ...}` into the description that the plugin of that name defines."""

    def build(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if not isinstance(value.get("name"), str):
            raise ValueError(f"say which one: `name:` one of {', '.join(plugins.names(kind))}")
        described = plugins.description(kind, value["name"])
        try:
            return described.model_validate(value)
        except ValidationError as error:
            raise ValueError("; ".join(explain(error, described))) from None

    return BeforeValidator(build)


if TYPE_CHECKING:
    from videorepa.backbones import BackboneSpec as BackboneField
    from videorepa.encoders import EncoderSpec as EncoderField
    from videorepa.losses import Loss as LossField
else:
    BackboneField = Annotated[SerializeAsAny[Section], _described_by("backbones")]
    EncoderField = Annotated[SerializeAsAny[Section], _described_by("encoders")]
    LossField = Annotated[SerializeAsAny[Section], _described_by("losses")]


def _block_or(*words: str) -> PlainValidator:
    def check(value: Any) -> int | str:
        is_block = isinstance(value, int) and not isinstance(value, bool) and value >= 1
        if is_block or value in words:
            return value
        raise ValueError(f"expected a block's number, an integer from 1, or {' or '.join(words)}")

    return PlainValidator(check)


class When(Section):
    """When an alignment term counts: over the steps, until a rule stops it, and at which noise.

    until: the step from which on it counts no more.
    decay: how its weight goes to 0 by then; "constant" stops all at once.
    opposed: stops it for good once its gradient at the tapped tokens opposed the diffusion loss's
        (mean cosine below 0) over this many steps, as HASTE does (arXiv 2505.16792).
    gate: "signal" scales each sample's part by 1 - sigma^2, its share of signal at that noise
        level, as LaMo does (arXiv 2605.23878).
    """

    until: int | None = Field(default=None, ge=1)
    decay: Literal["constant", "linear", "cosine"] = "constant"
    opposed: int | None = Field(default=None, ge=1)
    gate: Literal["none", "signal"] = "none"

    @model_validator(mode="after")
    def _decays_by_some_step(self) -> When:
        if self.decay != "constant" and self.until is None:
            raise ValueError(f"a {self.decay} decay needs `until`, the step it ends at")
        return self

    def share(self, step: int) -> float:
        """The share of the term's weight at a step, 0 to 1."""
        if self.until is None:
            return 1.0
        if step >= self.until:
            return 0.0
        progress = step / self.until
        if self.decay == "linear":
            return 1.0 - progress
        return 0.5 + 0.5 * math.cos(math.pi * progress) if self.decay == "cosine" else 1.0


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
    block: Annotated[int | Literal["clean"], _block_or("clean")]
    target: Annotated[int | Literal["encoder", "latents"], _block_or("encoder", "latents")] = (
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


class LabClips(Section):
    """Clips drawn by the lab's simulator: numbers 0 to `clips` of the series that `seed` names.

    split: "beyond" draws what is faster, larger or higher than any of "within".
    """

    clips: int = Field(ge=1)
    seed: int = 0
    split: Literal["within", "beyond"] = "within"


class ClipSize(Section):
    """A clip as the backbone sees it: frames, and pixels down and across."""

    frames: int = Field(default=49, ge=1)
    height: int = Field(default=480, ge=8)
    width: int = Field(default=720, ge=8)


class Data(ClipSize):
    """Where captioned clips come from, what they are made into, and where that is kept.

    Exactly one of `manifest` (CSV or JSONL) and `lab`. Paths are taken from the current folder.
    root: folder that the manifest's paths start from; by default the manifest's own.
    cache: folder of latents, text embeddings and teacher features; recipes can share one.
    prepare_batch: clips that `prepare` encodes at once.
    """

    manifest: Path | None = None
    root: Path | None = None
    lab: LabClips | None = None
    cache: Path
    prepare_batch: int = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.manifest is None) == (self.lab is None):
            raise ValueError("give exactly one of `manifest` and `lab`")
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """AdamW, and how many samples it sees. One step uses batch_size x accumulate clips in each
    process."""

    steps: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    batch_size: int = Field(default=1, ge=1)
    accumulate: int = Field(default=1, ge=1)
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_steps: int = Field(default=100, ge=0)
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: float = Field(default=1.0, gt=0)

    def clips(self, processes: int) -> int:
        """How many clips a step has, over all processes."""
        return self.batch_size * self.accumulate * processes


class Lora(Section):
    """Low-rank adapters in place of training all weights; applied at alpha / rank.

    targets: ends of the names of the layers that get one; by default the backbone's own choice.
    """

    rank: int = Field(default=128, ge=1)
    alpha: float = Field(default=64, gt=0)
    targets: tuple[str, ...] | None = None


class Train(Section):
    """What is trained and how it is kept.

    lora: None trains all of the transformer's weights.
    precision: "auto" computes in bfloat16 where the hardware does it, else in float32. Trained
        weights stay in float32.
    ema: decay of an average of the trained weights, which is what is exported then.
    caption_dropout: share of samples trained on an empty caption, for classifier-free guidance.
    keep_checkpoints: how many of the newest stay.
    """

    lora: Lora | None = None
    precision: Literal["auto", "float32"] = "auto"
    ema: float | None = Field(default=None, gt=0, lt=1)
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


class Memory(Section):
    """What a training does to take less memory; `docs/memory.md` has what each saves and costs.

    gradient_checkpointing: keep the blocks' inputs alone and compute what lies between once more
        in the backward pass.
    frozen: what the weights that LoRA leaves as they are, are held in; they are computed with in
        the training's precision. "int8" needs torchao and "nf4" bitsandbytes.
    optimizer: "adamw8bit" keeps AdamW's moments in 8 bits; needs bitsandbytes.
    offload: "group" keeps frozen layers in the machine's memory and brings each to the GPU when it
        runs.
    """

    gradient_checkpointing: bool = False
    frozen: Literal["float32", "bfloat16", "float8", "int8", "nf4"] = "float32"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    offload: Literal["none", "group"] = "none"

    @property
    def is_quantised(self) -> bool:
        """Whether frozen weights are held as integers with scales."""
        return self.frozen in ("int8", "nf4")

    @model_validator(mode="after")
    def _offloaded_weights_come_back(self) -> Memory:
        if self.offload == "none":
            return self
        if not self.gradient_checkpointing:
            raise ValueError(
                "offload: group needs gradient_checkpointing: true, or the backward pass keeps "
                "every layer that was brought to the GPU there"
            )
        if self.is_quantised:
            raise ValueError(f"offload: group does not go with frozen: {self.frozen}")
        return self


class Parallel(Section):
    """How several processes share a training; a launcher such as `accelerate launch` starts them.

    engine: "ddp" keeps the whole training in each process, "fsdp2" a share of all of it, and
        "zero2" (DeepSpeed) all weights and a share of the rest. Without this section the user's
        own accelerate configuration counts, and DDP where there is none.
    offload: keep FSDP2's shares, or ZeRO-2's of the optimiser, in the machine's memory and not the
        GPU's.
    """

    engine: Literal["ddp", "fsdp2", "zero2"]
    offload: bool = False

    @model_validator(mode="after")
    def _has_shares(self) -> Parallel:
        if self.offload and self.engine == "ddp":
            raise ValueError("offload keeps shares elsewhere, and ddp has none")
        return self


class Generation(Section):
    """How clips are sampled; the defaults are the published ones for CogVideoX. What a recipe
    leaves out is as its backbone was published.

    dynamic_guidance: guidance that grows while the noise goes; CogVideoX alone has it.
    samples: clips per prompt, each with a seed of its own.
    """

    steps: int = Field(default=50, ge=1)
    guidance_scale: float = Field(default=6.0, ge=0)
    dynamic_guidance: bool = True
    samples: int = Field(default=1, ge=1)
    fps: int = Field(default=8, ge=1)

    def changed(self, **values: Any) -> Generation:
        """A copy with some values changed. Raises UserError that names those that cannot be."""
        try:
            return self.model_validate(self.model_dump() | values)
        except ValidationError as error:
            said = "\n".join(explain(error, Generation))
            raise UserError(f"Clips cannot be generated so:\n{said}") from None


def _as_published(value: Any, info: ValidationInfo) -> Any:
    """Fills in what the recipe leaves out of `generation`."""
    backbone = info.data.get("backbone")
    return backbone.generation | value if backbone and isinstance(value, dict) else value


class Validation(Section):
    """Clips generated while training, at fixed seeds, every so many steps.

    drift: how far their saturation, contrast, sharpness and motion may be from the base model's
        before there is a warning, as a share of those.
    """

    every: int = Field(ge=1)
    prompts: tuple[str, ...] = Field(min_length=1)
    drift: float = Field(default=0.3, gt=0)


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
        from videorepa.data.files import atomic_write

        atomic_write(Path(path), self.text())
