"""The sections of a recipe that name no plugin."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
    field_validator,
    model_validator,
)

from videorepa.settings.bounds import (
    AtOnce,
    Clips,
    Count,
    DenoisingSteps,
    Fps,
    Frames,
    Number,
    Rate,
    Seed,
    Share,
    Side,
    Width,
)
from videorepa.settings.section import Section, spelling
from videorepa.system.wording import count

Knot = tuple[Share, Annotated[float, Field(ge=0)]]
"""A point of a curve over the noise: a noise level sigma, and the factor there."""

Gate = Annotated[
    Annotated[Literal["none", "signal"], Tag("one")]
    | Annotated[tuple[Knot, ...], Field(min_length=2), Tag("many")],
    Discriminator(spelling),
]


class When(Section):
    """When an alignment term counts: at which steps and noise levels, and until which event.

    Attributes:
      until: The first step at which the term counts no more.
      decay: How its weight goes to 0 by then; "constant" drops it all at once.
      opposed: Stops the term for good once its gradient at the tapped tokens has opposed that of
        the denoising loss (mean cosine below 0) over this many steps, as HASTE does (arXiv
        2505.16792).
      gate: The factor of each sample's loss by its noise level sigma, from 0 (no noise) to 1 (noise
        alone). "signal" is 1 - sigma^2, the share of signal, as in LaMo (arXiv 2605.23878). A list
        of points [sigma, factor] is a curve: linear between them, constant beyond the ends.
    """

    until: Number | None = None
    decay: Literal["constant", "linear", "cosine"] = "constant"
    opposed: Number | None = None
    gate: Gate = "none"

    @field_validator("gate")
    @classmethod
    def _curve_rises_in_sigma(cls, gate: Gate) -> Gate:
        if isinstance(gate, str):
            return gate
        if any(here[0] >= there[0] for here, there in pairwise(gate)):
            raise ValueError("list the points [sigma, factor] by rising sigma, each sigma once")
        if not any(factor for _, factor in gate):
            raise ValueError("a curve that is 0 everywhere lets nothing count; use weight: 0")
        return gate

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


class LabClips(Section):
    """Clips drawn by the lab's simulator: numbers 0 to `clips` - 1 of the series that `seed` names.

    Attributes:
      split: "beyond" draws scenes that are faster, larger or higher than all of "within".
    """

    clips: Clips
    seed: Seed = 0
    split: Literal["within", "beyond"] = "within"


class ClipSize(Section):
    """The size of a clip as the backbone sees it, in frames and pixels."""

    frames: Frames = 49
    height: Annotated[Side, Field(ge=8)] = 480
    width: Annotated[Side, Field(ge=8)] = 720


class Continuation(Section):
    """What the model is shown of a clip in training, so that it continues the clip.

    What is left out is as the model's authors train it; `docs/first-frame.md` says how that is.

    Attributes:
      latents: How many of the clip's first latents: 1 is the first frame. Of several numbers one is
        drawn for each sample.
      probability: Share of samples that are shown them; the others are of text alone.
      dropout: Share of samples from which the image is taken away again, for models that expect
        one and are trained without it at times, as for guidance.
    """

    latents: Annotated[
        tuple[Frames, ...] | None,
        Field(min_length=1),
        BeforeValidator(lambda value: (value,) if isinstance(value, int) else value),
    ] = None
    probability: Share | None = None
    dropout: Share | None = None


class Data(ClipSize):
    """Where captioned clips come from, their size, and where they are cached.

    Exactly one of `manifest` and `lab` is set. Paths are relative to the current folder.

    Attributes:
      manifest: A CSV or JSONL file that lists videos and captions.
      root: Folder that the manifest's paths start from; by default the manifest's own.
      lab: Clips of the lab's simulator.
      fps: Frames per second that clips of videos show. By default a clip is spread over its video,
        as published: it has every n-th frame, with n as large as the video's length allows.
      condition: What the model is shown of a clip. Left out, it is text alone, or the first frame
        where the model has no text mode.
      cache: Folder of latents, text embeddings and teacher features. Recipes can share it.
      prepare_batch: How many clips `prepare` encodes at once.
    """

    manifest: Path | None = None
    root: Path | None = None
    lab: LabClips | None = None
    fps: Rate | None = None
    condition: Continuation | None = None
    cache: Path
    prepare_batch: AtOnce = 1

    @model_validator(mode="after")
    def _one_source(self) -> Data:
        if (self.manifest is None) == (self.lab is None):
            raise ValueError("give exactly one of `manifest` and `lab`")
        if self.lab is not None and self.fps is not None:
            raise ValueError("`fps` is for a `manifest`: the lab draws clips at a rate of its own")
        return self


Decay = Annotated[float, Field(ge=0, lt=1)]


class Optim(Section):
    """AdamW, its learning rate, and how many clips it sees.

    Attributes:
      steps: Updates of the weights.
      batch_size: Clips of each process at once.
      accumulate: Batches whose gradients are averaged for a step.
      warmup_steps: Steps over which the learning rate rises from 0.
      schedule: How the learning rate falls after that.
    """

    steps: Number
    learning_rate: float = Field(gt=0)
    batch_size: AtOnce = 1
    accumulate: AtOnce = 1
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=1e-4, ge=0)
    warmup_steps: Count = 100
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    max_grad_norm: float = Field(default=1.0, gt=0)

    def clips(self, processes: int) -> int:
        """How many clips a step has in all processes together."""
        return self.batch_size * self.accumulate * processes


class Lora(Section):
    """Low-rank adapters, trained in place of all weights and applied with strength alpha / rank.

    Attributes:
      targets: Endings of the names of the layers that get an adapter; by default the backbone's
        own choice.
    """

    rank: Width = 128
    alpha: float = Field(default=64, gt=0)
    targets: tuple[str, ...] | None = None


class Train(Section):
    """What is trained, in which precision, and how it is kept.

    Attributes:
      lora: None trains all of the transformer's weights.
      from_scratch: Starts from random weights, which `seed` draws, instead of the checkpoint's.
      precision: "auto" computes in bfloat16 if the hardware supports it, or else in float32.
        Trained weights are always held in float32.
      deterministic: Takes kernels that give the same bits each time. A CPU does so anyway; on a
        GPU they are slower, and resuming is exact with them alone.
      ema: Decay of a moving average of the trained weights, which then replaces them in exports.
      caption_dropout: Share of samples trained on an empty caption, for classifier-free guidance.
      checkpoint_every: Steps between two checkpoints.
      keep_checkpoints: How many of the newest checkpoints are kept.
    """

    lora: Lora | None = None
    from_scratch: bool = False
    precision: Literal["auto", "float32"] = "auto"
    deterministic: bool = False
    ema: float | None = Field(default=None, gt=0, lt=1)
    caption_dropout: Share = 0.0
    checkpoint_every: Number = 500
    keep_checkpoints: Number = 2
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ()

    @model_validator(mode="after")
    def _an_adapter_needs_trained_weights(self) -> Train:
        if self.from_scratch and self.lora is not None:
            raise ValueError(
                "from_scratch: true is for training all weights; an adapter of random weights that "
                "stay as they are learns nothing. Take out lora or from_scratch"
            )
        return self


class Memory(Section):
    """How a training saves memory. `docs/running.md` lists what each way saves and costs.

    Attributes:
      gradient_checkpointing: Keeps only the inputs of the blocks, and computes the rest once more
        in the backward pass. A number n does so with every n-th block, and keeps the others whole.
      offload_activations: Keeps these inputs in main memory until the backward pass.
      frozen: Format of the weights that LoRA leaves unchanged. They are converted to the training's
        precision for computing, which is the format that "auto" takes. "int8" needs torchao and
        "nf4" bitsandbytes.
      optimizer: "adamw8bit" keeps AdamW's moments in 8 bits; it needs bitsandbytes.
      offload: "group" keeps frozen layers in main memory and moves each to the GPU when it runs.
    """

    gradient_checkpointing: bool | Number = False
    offload_activations: bool = False
    frozen: Literal["auto", "float32", "bfloat16", "float8", "int8", "nf4"] = "auto"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    offload: Literal["none", "group"] = "none"

    def checkpoints(self, number: int) -> bool:
        """Whether the block with this number, from 1, is computed again in the backward pass."""
        every = int(self.gradient_checkpointing)  # True is every block.
        return every > 0 and number % every == 0

    @property
    def is_quantised(self) -> bool:
        """Whether frozen weights are held as integers with scales."""
        return self.frozen in ("int8", "nf4")

    @model_validator(mode="after")
    def _offloaded_activations_are_inputs(self) -> Memory:
        if self.offload_activations and not self.gradient_checkpointing:
            raise ValueError(
                "offload_activations: true needs gradient_checkpointing; without it there are many "
                "times as many activations, and the weights among them"
            )
        return self

    @model_validator(mode="after")
    def _offloaded_weights_come_back(self) -> Memory:
        if self.offload == "none":
            return self
        if not self.gradient_checkpointing:
            raise ValueError(
                "offload: group needs gradient_checkpointing: true; without it the backward pass "
                "keeps every layer on the GPU"
            )
        if self.is_quantised:
            raise ValueError(f"offload: group does not go with frozen: {self.frozen}")
        return self


class Speed(Section):
    """How a training computes fast. `docs/running.md` says what each way needs.

    Attributes:
      attention: The backend of diffusers that computes attention, such as "flash" or "flex"; by
        default torch chooses.
      compile: Compiles the transformer's blocks with torch.compile.
      peak_tflops: The device's peak rate in 10^12 operations a second, which the log's `mfu` is a
        share of. By default that of its data sheet, if `system/device.py` has it.
    """

    attention: str | None = Field(default=None, max_length=100)
    compile: bool = False
    peak_tflops: float | None = Field(default=None, gt=0)


class Parallel(Section):
    """How the processes that a launcher such as `accelerate launch` starts share a training.

    Without this section the user's own accelerate configuration decides, and DDP without one.

    Attributes:
      engine: "ddp" keeps the whole training in each process, "fsdp2" a shard of it.
      context: How many processes share the tokens of each clip, for clips that are too long for
        one (Ulysses). They count as one process in what `optim` says of a step's clips.
      offload: Keeps FSDP2's shards in main memory and not in the GPU's.
      reshard_after_forward: Frees the gathered parameters after the forward pass and gathers them
        again for the backward pass. False keeps them in between, which is the sharding of ZeRO-2:
        faster, with all weights in each process.
    """

    engine: Literal["ddp", "fsdp2"]
    context: AtOnce = 1
    offload: bool = False
    reshard_after_forward: bool = True

    @field_validator("engine", mode="before")
    @classmethod
    def _is_not_zero2(cls, value: Any) -> Any:
        if value == "zero2":
            raise ValueError(
                "there is no zero2; engine: fsdp2 with reshard_after_forward: false shards alike"
            )
        return value

    @model_validator(mode="after")
    def _has_shards(self) -> Parallel:
        if self.engine == "ddp" and (self.offload or not self.reshard_after_forward):
            raise ValueError("offload and reshard_after_forward are for shards, and ddp has none")
        return self


class Generation(Section):
    """How clips are sampled.

    The defaults are those published for CogVideoX. What a recipe leaves out takes the value that
    was published for its backbone.

    Attributes:
      dynamic_guidance: Raises the guidance while the noise falls. Only CogVideoX has it.
      negative_prompt: What guidance leads away from, where the model has a second pass for it. Left
        out, it is the authors' own for Wan, LTX, Kandinsky and Cosmos, and empty for the others.
      samples: Clips per prompt, each with its own seed.
      tiling: Decodes clips of more than 256 pixels a side in overlapping tiles, as diffusers does:
        in a fraction of the memory, with small differences around the seams.
    """

    steps: DenoisingSteps = 50
    guidance_scale: float = Field(default=6.0, ge=0)
    dynamic_guidance: bool = True
    negative_prompt: str = ""
    samples: AtOnce = 1
    tiling: bool = True
    fps: Fps = 8

    def changed(self, **values: Any) -> Generation:
        """Make a copy with some values changed. Raises UserError that names impossible ones."""
        return self.checked(self.model_dump() | values, "Clips cannot be generated so")


class Validation(Section):
    """What is looked at during the training: clips that are generated, pairs that are asked about.

    Attributes:
      every: Steps from one validation to the next.
      prompts: One clip is generated for each, with a fixed seed.
      images: For each prompt the image that its clip continues, for models that continue one.
      pairs: A list of pairs of clips, as for `videorepa likelihood`: which does the model find
        likelier?
      drift: How far the clips' saturation, contrast, sharpness and motion may move away from the
        base model's before a warning, as a share of the base model's.
    """

    every: Number
    prompts: tuple[str, ...] = ()
    images: tuple[Path, ...] = ()
    pairs: Path | None = None
    drift: float = Field(default=0.3, gt=0)

    @model_validator(mode="after")
    def _looks_at_something(self) -> Validation:
        if not self.prompts and self.pairs is None:
            raise ValueError("give `prompts`, `pairs` or both")
        if self.images and len(self.images) != len(self.prompts):
            raise ValueError(
                f"there are {count(len(self.images), 'image')} and "
                f"{count(len(self.prompts), 'prompt')}; give one image for each prompt, or none"
            )
        return self
