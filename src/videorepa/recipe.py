"""The recipe: one typed, frozen description of a whole run, read from and written to YAML.

A recipe is data. Nothing in it is ever executed; the names of plugins are names of files that are
already installed.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SerializeAsAny,
    ValidationError,
    ValidationInfo,
    model_validator,
)

from videorepa import plugins
from videorepa.errors import UserError


class Section(BaseModel):
    """A part of a recipe: frozen, and unknown keys are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


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
            raise ValueError("; ".join(_explain(error, described))) from None

    return BeforeValidator(build)


if TYPE_CHECKING:
    from videorepa.backbones import BackboneSpec as BackboneField
    from videorepa.encoders import EncoderSpec as EncoderField
    from videorepa.losses import Loss as LossField
else:
    BackboneField = Annotated[SerializeAsAny[Section], _described_by("backbones")]
    EncoderField = Annotated[SerializeAsAny[Section], _described_by("encoders")]
    LossField = Annotated[SerializeAsAny[Section], _described_by("losses")]


class Align(Section):
    """What is compared with the teacher, how, and how much it counts.

    block: the transformer block whose output is tapped, counted from 1 as in the paper.
    weight: coefficient of the alignment loss; 0 is plain fine-tuning through the same code, with
        the loss still measured and logged.
    hidden: width of the projector's hidden layers.
    teacher: "cached" reads features that `prepare` stored; "online" decodes the clip and runs the
        teacher at every step.
    """

    loss: LossField = Field(default_factory=lambda: plugins.description("losses", "relation")())
    block: int = Field(ge=1)
    weight: float = Field(default=0.5, ge=0.0)
    hidden: int = Field(default=2048, ge=1)
    teacher: Literal["cached", "online"] = "cached"


class LabClips(Section):
    """Clips drawn by the lab's simulator: numbers 0 to `clips` of the series that `seed` names."""

    clips: int = Field(ge=1)
    seed: int = 0


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
    """AdamW, and how many samples it sees. One step uses batch_size x accumulate clips."""

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
    precision: "auto" computes in bfloat16 where the hardware does it, else in float32. "bfloat16"
        also holds the frozen weights under LoRA in it. Trained weights stay in float32.
    ema: decay of an average of the trained weights, which is what is exported then.
    caption_dropout: share of samples trained on an empty caption, for classifier-free guidance.
    keep_checkpoints: how many of the newest stay.
    """

    lora: Lora | None = None
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    gradient_checkpointing: bool = False
    ema: float | None = Field(default=None, gt=0, lt=1)
    caption_dropout: float = Field(default=0.0, ge=0, le=1)
    checkpoint_every: int = Field(default=500, ge=1)
    keep_checkpoints: int = Field(default=2, ge=1)
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()


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
            said = "\n".join(_explain(error, Generation))
            raise UserError(f"Clips cannot be generated so:\n{said}") from None


def _as_published(value: Any, info: ValidationInfo) -> Any:
    """Fills in what the recipe leaves out of `generation`."""
    backbone = info.data.get("backbone")
    return backbone.generation | value if backbone and isinstance(value, dict) else value


class Validation(Section):
    """Clips generated while training, at fixed seeds, every so many steps."""

    every: int = Field(ge=1)
    prompts: tuple[str, ...] = Field(min_length=1)


class Recipe(Section):
    """One run, whole: `Recipe.from_yaml(path)`, and back with `.to_yaml(path)`.

    encoder, align: both, or neither for a training that no teacher has part in.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}$")
    about: str = ""
    seed: int = Field(default=0, ge=0)
    backbone: BackboneField
    encoder: EncoderField | None = None
    align: Align | None = None
    data: Data
    optim: Optim
    train: Train = Train()
    generation: Annotated[Generation, BeforeValidator(_as_published)] = Field(
        default_factory=dict, validate_default=True
    )
    validation: Validation | None = None

    @model_validator(mode="after")
    def _teacher_and_alignment(self) -> Recipe:
        if (self.encoder is None) != (self.align is None):
            raise ValueError("give both `encoder` and `align`, or neither")
        return self

    @property
    def alignment(self) -> tuple[Align, EncoderField] | None:
        """The alignment with its teacher, or None."""
        if self.align is None or self.encoder is None:
            return None
        return self.align, self.encoder

    @property
    def stores_features(self) -> bool:
        """Whether training reads teacher features from the cache."""
        return self.align is not None and self.align.teacher == "cached"

    @classmethod
    def from_yaml(cls, path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
        """Read a recipe. Overrides are `dotted.key=value`, with the value in YAML.

        Raises UserError that names the file, the key and what was expected there.
        """
        path = Path(path)
        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UserError(
                f"There is no recipe {path}. The shipped ones are in recipes/."
            ) from None
        except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
            raise UserError(f"The recipe {path} cannot be read as YAML: {error}") from None
        if not isinstance(values, dict):
            raise UserError(
                f"The recipe {path} holds {type(values).__name__}; expected keys and values."
            )
        for override in overrides:
            _override(values, override)
        return cls.parse(values, source=str(path))

    @classmethod
    def parse(cls, values: dict[str, Any], source: str = "recipe") -> Recipe:
        """Check plain values. Raises UserError with every fault on a line of its own."""
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(
                f"{source} is not a recipe:\n" + "\n".join(_explain(error, cls))
            ) from None

    def override(self, *overrides: str) -> Recipe:
        """A copy with some keys changed, each `dotted.key=value`."""
        values = self.model_dump(mode="json")
        for override in overrides:
            _override(values, override)
        return self.parse(values)

    def text(self) -> str:
        """The recipe as YAML, defaults and all."""
        values = self.model_dump(mode="json")
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    def to_yaml(self, path: Path | str) -> None:
        """Write it, atomically."""
        from videorepa.data.files import atomic_write

        atomic_write(Path(path), self.text())


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise UserError(f"An override is written key=value or --key value; got {override!r}.")
    *parents, last = key.split(".")
    for parent in parents:
        if values.get(parent) is None:
            values[parent] = {}
        values = values[parent]
        if not isinstance(values, dict):
            raise UserError(
                f"The override {key!r} goes through {parent!r}, which is a single value."
            )
    try:
        values[last] = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError) as error:
        raise UserError(
            f"The override {override!r} has a value that is not YAML ({error}). Put the whole in "
            "quotes if the shell takes it apart."
        ) from None


def _explain(error: ValidationError, model: type[BaseModel]) -> list[str]:
    lines = []
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"]) or "recipe"
        if fault["type"] == "extra_forbidden":
            known = _known_keys(model, fault["loc"][:-1])
            close = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else f"; known: {', '.join(known)}"
            lines.append(f"  {where}: unknown key{hint}")
        elif fault["type"] == "missing":
            lines.append(f"  {where}: missing")
        else:
            found = repr(fault["input"])
            message = fault["msg"].removeprefix("Value error, ").strip()
            lines.append(f"  {where}: {message} (found {found[:80]})")
    return lines


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Keys at a place in the recipe; [] inside a plugin's own description."""
    for part in path:
        field = model.model_fields.get(str(part))
        inner = [t for t in _types(field.annotation)] if field else []
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _types(annotation: Any) -> list[type[BaseModel]]:
    options = getattr(annotation, "__args__", (annotation,))
    return [t for t in options if isinstance(t, type) and issubclass(t, BaseModel)]
