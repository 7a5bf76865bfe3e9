"""The sources that a scan and a probe measure: models, teachers and straw men to compare with."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from videorepa.artifacts.model import Model
from videorepa.artifacts.run import Run
from videorepa.encoders import EncoderSpec
from videorepa.encoders.pixels import Pixels
from videorepa.encoders.untrained import Untrained
from videorepa.errors import UserError
from videorepa.probing.blocks import (
    Blocks,
    EncodedClips,
    draw_latents,
    draw_noise,
    encode_captions,
)
from videorepa.probing.clips import Clips
from videorepa.probing.projectors import digest, trained_projectors
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.system.files import short_name
from videorepa.system.wording import shown
from videorepa.tokens import TokenGrid

BASE, PIXELS, UNTRAINED = "base", "pixels", "untrained"

PROJECTED = "+projector"
"""Added to the name of a model that is read through its projector."""

SLICES = 3
"""Number of evenly spaced steps in time that a probe reads, as for VideoREPA's figure 1."""


def teachers_from(texts: Sequence[str], recipe: Recipe) -> dict[str, EncoderSpec]:
    """Parse further teachers, each NAME=WEIGHTS or NAME=WEIGHTS,KEY=VALUE,...

    Keys that are left out have the values of the recipe's first teacher of that name, if it has
    one, and otherwise the encoder's defaults.

    Returns:
        The teachers by their encoders' names, or by their whole texts where names are the same.

    Raises:
        UserError: An encoder or a key is unknown, or a value is not valid.
    """
    specs = {text: _teacher_from(text, recipe) for text in texts}
    names = [spec.name for spec in (*recipe.teachers, *specs.values())]
    return {
        spec.name if names.count(spec.name) == 1 else text: spec for text, spec in specs.items()
    }


def _teacher_from(text: str, recipe: Recipe) -> EncoderSpec:
    first, *rest = text.split(",")
    kind, _, weights = first.partition("=")
    options = {key: value for key, _, value in (option.partition("=") for option in rest)}
    if not weights or not all(options.values()):
        raise UserError(
            f"A teacher is NAME=WEIGHTS or NAME=WEIGHTS,KEY=VALUE,...; got {shown(text)}."
        )
    spec = plugins.description("encoders", kind)
    same_kind = (teacher.model_dump() for teacher in recipe.teachers if teacher.name == kind)
    values = next(same_kind, {}) | {"name": kind, "weights": weights} | options
    return spec.checked(values, f"The teacher {shown(text)} is not valid")


def all_teachers(recipe: Recipe, further: Mapping[str, EncoderSpec]) -> dict[str, EncoderSpec]:
    """The recipe's teachers and further ones, by name.

    The recipe's have their encoders' names; a second one of a name has a number, as in videomae-2.

    Raises:
        UserError: Two have one name, or one cannot see frames.
    """
    own: dict[str, EncoderSpec] = {}
    for teacher in recipe.teachers:
        earlier = sum(spec.name == teacher.name for spec in own.values())
        own[f"{teacher.name}-{earlier + 1}" if earlier else teacher.name] = teacher
    if twice := sorted(own.keys() & further.keys()):
        raise UserError(f"Two teachers have the name {', '.join(twice)}. Give each its own name.")
    together = own | dict(further)
    for spec in together.values():
        spec.check_sees()
    return together


def straw_men(teacher: EncoderSpec) -> dict[str, EncoderSpec]:
    """The encoders that a teacher has to beat, by name."""
    return {PIXELS: Pixels.on_grid_of(teacher), UNTRAINED: Untrained(of=teacher)}


def models_by_name(models: Sequence[Path]) -> dict[str, Path]:
    """Models by the names of their folders or files, or by whole paths where names are the same."""
    names = [short_name(path) for path in models]
    return {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, models, strict=True)
    }


def check_blocks(blocks: Sequence[int], existing: int) -> None:
    """Raise UserError unless there are blocks and all are numbered from 1 to `existing`."""
    if not blocks or min(blocks) < 1 or max(blocks) > existing:
        raise UserError(
            f"The base model's blocks are numbered 1 to {existing}; got "
            f"{', '.join(map(str, blocks)) or 'none'}."
        )


def slices(grid: TokenGrid, steps: int, side: int) -> Float[np.ndarray, "b d"]:
    """The tokens of some evenly spaced steps in time, one row for each clip.

    Steps that begin before the clip are left out, such as CogVideoX's first, which is frame 0
    alone.

    Args:
        steps: How many steps.
        side: Rows and columns to which each step's tokens are averaged.
    """
    grid = grid.beginning_at(0).averaged(side)
    which = np.linspace(0, grid.size[0] - 1, steps).round().astype(int)
    return grid.tokens[:, which].flatten(1).float().cpu().numpy()


Features = dict[str, Float[np.ndarray, "n d"]]


@dataclass(frozen=True)
class Pooling:
    """How features are made of a grid of tokens.

    Attributes:
        steps: Number of evenly spaced steps in time.
        sides: Rows and columns to which each step's tokens are averaged, each for separate
            features.
        are_distinct: Whether a grid of fewer steps is refused. Otherwise some are read twice.
    """

    steps: int
    sides: Sequence[int]
    are_distinct: bool = False

    def check(self, name: str, grid: TokenGrid) -> None:
        """Raise UserError if the steps have to be distinct and the grid has fewer.

        Args:
            name: The source's name, for the message.
            grid: Its shape alone counts.
        """
        there = grid.beginning_at(0).size[0]
        if self.are_distinct and there < self.steps:
            raise UserError(
                f"The protocol reads {self.steps} steps in time of {name}, which has {there} for "
                "these clips. Give it more frames, or choose another protocol."
            )

    def features(self, grid: TokenGrid, block: int | None = None) -> Features:
        """The features of a grid, by their keys in the store."""
        return {feature_key(block, side): slices(grid, self.steps, side) for side in self.sides}


def feature_key(block: int | None, side: int) -> str:
    """The key of features in the store."""
    return f"pool {side}" if block is None else f"block {block}, pool {side}"


class Condition(NamedTuple):
    """The noise in a model's input. Both are None for an encoder, which sees the clean clip.

    Attributes:
        timestep: Timestep of the noise.
        draw: Number of the draw of noise, counted from 0.
    """

    timestep: int | None = None
    draw: int | None = None

    def __str__(self) -> str:
        return "clean" if self.timestep is None else f"t{self.timestep:03d}-draw{self.draw}"


FeaturesOf = Callable[[Clips, Sequence[Condition]], Iterator[tuple[Condition, Features]]]
"""Yields the features of clips, by their keys, under each condition."""


@dataclass(frozen=True)
class ModelFeatures:
    """Features of a model's blocks for noisy clips.

    Attributes:
        path: A run, recipe or diffusers folder; None for `base`. It is opened only when needed,
            since a run's checkpoint is large.
        base: The base model, whose clip size and precision all models use.
        seed: Seed of latents and noise.
        through_projector: Whether the blocks are read after the projectors that were trained on
            them.
    """

    path: Path | None
    base: Model
    blocks: Sequence[int]
    conditions: Sequence[Condition]
    pooling: Pooling
    seed: int
    through_projector: bool = False

    @cached_property
    def step(self) -> int | None:
        """The step of the run's checkpoint; None if the model is no run.

        It stays that of the first look, since the run may train on meanwhile.
        """
        if self.path is None or not Run.is_one(self.path):
            return None
        return Run.open(self.path).trained_step

    def _open(self) -> Model:
        model = self.base if self.path is None else Model.of(self.path, step=self.step)
        model.spec.check_clip(self.base.size)
        shapes = model.spec.shapes(self.base.size)
        if self.blocks[-1] > shapes.blocks:
            raise UserError(
                f"{model.name} has the blocks 1 to {shapes.blocks}; got "
                f"{', '.join(map(str, self.blocks))}."
            )
        self.pooling.check(model.name, shapes.grid)
        return replace(model, precision=self.base.precision)

    def _projectors(self, model: Model) -> dict[int, Any] | None:
        if not self.through_projector:
            return None
        assert self.path is not None
        return trained_projectors(model, self.path, self.blocks)

    def made_with(self) -> dict[str, Any]:
        """What the features depend on, apart from the clips and the pools."""
        model = self._open()
        projectors = self._projectors(model)
        return {
            "steps": self.pooling.steps,
            "model": model.digest,
            "blocks": list(self.blocks),
            # Named also where there is none, so that neither kind is taken for the other.
            "projector": None if projectors is None else digest(projectors),
        }

    def load(self, device: torch.device, dtype: torch.dtype) -> FeaturesOf:
        """Load the model."""
        model = self._open()
        coder = model.spec.load(("text_encoder",), device, dtype)
        empty = coder.encode_text([""])
        # What sees every clip has to stay in memory beside the model; nothing else does.
        seeing = coder if model.spec.text_sees_image else None
        del coder
        backbone = model.load(device, dtype, ("transformer", "vae", "image_encoder"))
        blocks = Blocks(backbone, self.blocks)
        projectors = self._projectors(model)

        @torch.no_grad()
        def read(block: int, grid: TokenGrid) -> Features:
            if projectors is not None:
                grid = projectors[block].to(device).on_own_grid(grid.to(device))
            return self.pooling.features(grid, block)

        def features_of(clips: Clips, conditions: Sequence[Condition]) -> Iterator:
            latents, openings = draw_latents(backbone, clips, self.seed, "probe latents")
            text = encode_captions(seeing, clips) if seeing else [empty] * len(latents)
            # Some backbones have integer timesteps.
            like = backbone.sample_timesteps(latents[0][None], torch.Generator())
            for condition in conditions:
                assert condition.timestep is not None and condition.draw is not None
                noise = draw_noise(latents, clips, self.seed, "probe noise", condition.draw)
                encoded = EncodedClips(clips, latents, noise, text, openings)
                timestep = torch.full_like(like, condition.timestep)
                outputs = blocks.outputs(encoded, timestep)
                yield condition, _concatenated(read(block, grid) for _, block, grid in outputs)

        return features_of


@dataclass(frozen=True)
class EncoderFeatures:
    """Features of an encoder for clean clips."""

    spec: EncoderSpec
    pooling: Pooling
    blocks: Sequence[None] = (None,)
    conditions: Sequence[Condition] = (Condition(),)

    def made_with(self) -> dict[str, Any]:
        """What the features depend on, apart from the clips and the pools."""
        teacher = {"name": self.spec.name} | self.spec.fingerprint()
        return {"steps": self.pooling.steps, "teacher": teacher}

    def load(self, device: torch.device, dtype: torch.dtype) -> FeaturesOf:
        """Load the encoder."""
        encoder = self.spec.load(device, dtype)

        def features_of(clips: Clips, conditions: Sequence[Condition]) -> Iterator:
            grids = (encoder(clips.video(which)) for which in clips.batches())
            features = _concatenated(self.pooling.features(grid) for grid in grids)
            return ((condition, features) for condition in conditions)

        return features_of


def _concatenated(batches: Iterable[Features]) -> Features:
    """The features of all clips from those of batches."""
    parts = defaultdict(list)
    for batch in batches:
        for key, values in batch.items():
            parts[key].append(values)
    return {key: np.concatenate(values) for key, values in parts.items()}


FeatureSource = ModelFeatures | EncoderFeatures


def probed_sources(
    recipe: Recipe,
    models: Mapping[str, Path],
    teachers: Mapping[str, EncoderSpec],
    blocks: Sequence[int],
    conditions: Sequence[Condition],
    of_models: Pooling,
    of_encoders: Pooling,
    projected: Collection[str],
) -> dict[str, FeatureSource]:
    """All sources of a probe, by name: the recipe's base model first, straw men last.

    Args:
        projected: Names of the models to read through their projectors; `PROJECTED` is added.

    Raises:
        UserError: Two have the same name, or a teacher cannot see the recipe's clips or has too few
            steps in time.
    """
    encoders = all_teachers(recipe, teachers)
    straw = straw_men(recipe.teachers[0]) if recipe.teachers else {}
    base = Model(
        recipe.name, recipe.backbone, recipe.data, recipe.generation, recipe.train.precision
    )
    named: list[tuple[str, FeatureSource]] = []
    for name, path in [(BASE, None), *models.items()]:
        through = name in projected
        source = ModelFeatures(path, base, blocks, conditions, of_models, recipe.seed, through)
        named.append((name + PROJECTED * through, source))
    for name, spec in (*encoders.items(), *straw.items()):
        # `shape` raises for clips that it cannot see.
        of_encoders.check(name, spec.shape(recipe.data.frames))
        named.append((name, EncoderFeatures(spec, of_encoders)))
    names = [name for name, _ in named]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise UserError(f"Two sources have the name {', '.join(twice)}. Give each its own name.")
    return dict(named)
