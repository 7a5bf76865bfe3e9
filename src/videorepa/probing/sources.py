"""What a probe reads from: models, teachers, and the straw men that stand beside them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from videorepa.artifacts.model import Model as ModelSource
from videorepa.encoders import Encoder, EncoderSpec
from videorepa.encoders.untrained import Untrained, forget
from videorepa.errors import UserError
from videorepa.probing.blocks import Blocks, Encoded, draw_latents, draw_noise, slices
from videorepa.probing.clips import Clips, ShownFrames
from videorepa.probing.closeness import closeness
from videorepa.probing.records import Reading, contact_reading, mean_reading
from videorepa.recipe import Recipe
from videorepa.settings import plugins
from videorepa.settings.sections import ClipSize
from videorepa.system.files import short_name
from videorepa.system.progress import track
from videorepa.system.randomness import generator
from videorepa.tokens import TokenGrid


def teachers_from(texts: Sequence[str], recipe: Recipe) -> dict[str, EncoderSpec]:
    """Further teachers, each from NAME=WEIGHTS or NAME=WEIGHTS,KEY=VALUE,... They are called by
    their name if no other teacher has it, else by the whole text.

    Keys that are not given are as in the recipe, if its encoder is of that name, else the encoder's
    own defaults. Raises UserError for an unknown encoder or key.
    """
    specs = {text: _teacher_from(text, recipe) for text in texts}
    names = [spec.name for spec in (recipe.encoder, *specs.values()) if spec is not None]
    return {spec.name if names.count(spec.name) == 1 else t: spec for t, spec in specs.items()}


def _teacher_from(text: str, recipe: Recipe) -> EncoderSpec:
    first, *rest = text.split(",")
    kind, _, weights = first.partition("=")
    options = {key: value for key, _, value in (option.partition("=") for option in rest)}
    if not weights or not all(options.values()):
        raise UserError(f"A teacher is NAME=WEIGHTS or NAME=WEIGHTS,KEY=VALUE,...; got {text!r}.")
    described = plugins.description("encoders", kind)
    encoder = recipe.encoder
    known = encoder.model_dump() if encoder is not None and encoder.name == kind else {}
    try:
        return described.model_validate(known | {"name": kind, "weights": weights} | options)
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
        raise UserError(f"The teacher {text!r} is not possible: {'; '.join(faults)}.") from None


# What is to be measured, and whether it can be.


def all_teachers(recipe: Recipe, further: Mapping[str, EncoderSpec]) -> dict[str, EncoderSpec]:
    known = {} if recipe.encoder is None else {recipe.encoder.name: recipe.encoder}
    if twice := known.keys() & further.keys():
        raise UserError(f"Two teachers are called {', '.join(twice)}. Give each a name of its own.")
    known |= further
    if not known:
        raise UserError(
            f"The recipe {recipe.name} has no encoder, so there is no teacher to compare with. "
            "Give one with --teacher NAME=WEIGHTS."
        )
    return known


BASE, PIXELS, UNTRAINED = "base", "pixels", "untrained"


class Condition(NamedTuple):
    """The noise that a model is given: its timestep, and the how-many-th draw it is. Both None for
    what is given the clean clip."""

    timestep: int | None = None
    draw: int | None = None

    def __str__(self) -> str:
        return "clean" if self.timestep is None else f"t{self.timestep:03d}-draw{self.draw}"


def named(models: Sequence[Path]) -> dict[str, Path]:
    """Models by the names of their folders or files, or by their whole paths where names are the
    same."""
    names = [short_name(path) for path in models]
    return {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, models, strict=True)
    }


# What is read from.


class Source(Protocol):
    """A model or teacher, described."""

    @property
    def blocks(self) -> Sequence[int | None]:
        """Those that are read; (None,) for a teacher."""
        ...

    @property
    def conditions(self) -> Sequence[Condition]: ...

    def made_with(self) -> dict[str, Any]:
        """What its features depend on beside the clips."""
        ...

    def load(self, where: torch.device, dtype: torch.dtype) -> Live: ...


class Live(Protocol):
    """A loaded source."""

    def see(
        self, clips: Clips, ids: Sequence[str], conditions: Sequence[Condition], cut: ShownFrames
    ) -> Iterator[tuple[Condition, dict[str, Float[np.ndarray, "n d"]]]]:
        """Features of the clips by their keys (`feature_key`), for each condition."""
        ...


@dataclass(frozen=True)
class _Model:
    """path: a run, recipe or diffusers folder; None for the base model that `base` is. It is opened
    when it is needed: a run's checkpoint is large."""

    path: Path | None
    base: ModelSource
    blocks: Sequence[int]
    conditions: Sequence[Condition]
    steps: int
    pools: Sequence[int]

    def _open(self) -> ModelSource:
        source = self.base if self.path is None else ModelSource.of(self.path)
        source.spec.check_clip(self.base.size)
        existing = source.spec.shapes(self.base.size).blocks
        if self.blocks[-1] > existing:
            raise UserError(
                f"{source.name} has the blocks 1 to {existing}; got "
                f"{', '.join(map(str, self.blocks))}."
            )
        return replace(source, precision=self.base.precision)

    def made_with(self) -> dict[str, Any]:
        model = self._open().about()["model_digest"]
        return {
            "model": model,
            "blocks": list(self.blocks),
            "steps": self.steps,
            "pools": list(self.pools),
        }

    def load(self, where: torch.device, dtype: torch.dtype) -> Live:
        source = self._open()
        text = source.spec.load(("text_encoder",), where, dtype).encode_text([""])
        backbone = source.load(where, ("transformer", "vae"))
        return _LiveModel(self, Blocks(backbone, self.blocks), text)


@dataclass(frozen=True)
class _LiveModel:
    model: _Model
    student: Blocks
    text: dict[str, torch.Tensor]

    def see(
        self, clips: Clips, ids: Sequence[str], conditions: Sequence[Condition], cut: ShownFrames
    ) -> Iterator[tuple[Condition, dict[str, Float[np.ndarray, "n d"]]]]:
        backbone, model = self.student.backbone, self.model
        latents = draw_latents(
            backbone, clips, lambda n: generator(cut.seed, "probe latents", ids[n])
        )
        for condition in conditions:
            draw = condition.draw or 0
            noise = draw_noise(
                latents, lambda n, draw=draw: generator(cut.seed, "probe noise", ids[n], draw)
            )
            encoded = Encoded(clips, latents, noise, [self.text] * len(latents))
            # Of the kind that the model counts in: whole numbers or not.
            like = backbone.sample_timesteps(latents[0][None], torch.Generator())
            assert condition.timestep is not None
            timestep = torch.full_like(like, condition.timestep)
            features = defaultdict(list)
            for _, block, grid in self.student.outputs(encoded, timestep):
                for key, values in _features(grid, block, model.steps, model.pools).items():
                    features[key].append(values)
            yield condition, {key: np.concatenate(parts) for key, parts in features.items()}


@dataclass(frozen=True)
class _Teacher:
    """A teacher; or raw pixels, averaged over what its tokens cover."""

    spec: EncoderSpec
    size: ClipSize
    steps: int
    pools: Sequence[int]
    pixels: bool = False
    blocks: Sequence[None] = (None,)
    conditions: Sequence[Condition] = (Condition(),)

    def made_with(self) -> dict[str, Any]:
        like = {"pixels like": str(self.spec.shape(self.size.frames))}
        teacher = like if self.pixels else {"name": self.spec.name} | self.spec.fingerprint()
        return {"teacher": teacher, "steps": self.steps, "pools": list(self.pools)}

    def load(self, where: torch.device, dtype: torch.dtype) -> Live:
        like = self.spec.shape(self.size.frames)
        if self.pixels:
            return _LiveTeacher(self, lambda video: mean_colours(video, like))
        return _LiveTeacher(self, self.spec.load(where, dtype))


@dataclass(frozen=True)
class _LiveTeacher:
    teacher: _Teacher
    look: Any

    def see(
        self, clips: Clips, ids: Sequence[str], conditions: Sequence[Condition], cut: ShownFrames
    ) -> Iterator[tuple[Condition, dict[str, Float[np.ndarray, "n d"]]]]:
        features = defaultdict(list)
        for which in clips.batches():
            grid = self.look(clips.video(which))
            found = _features(grid, None, self.teacher.steps, self.teacher.pools)
            for key, values in found.items():
                features[key].append(values)
        for condition in conditions:
            yield condition, {key: np.concatenate(parts) for key, parts in features.items()}


def _features(
    grid: TokenGrid, block: int | None, steps: int, pools: Sequence[int]
) -> dict[str, Float[np.ndarray, "n d"]]:
    return {feature_key(block, pool): slices(grid, steps, pool) for pool in pools}


def feature_key(block: int | None, pool: int) -> str:
    return f"pool {pool}" if block is None else f"block {block}, pool {pool}"


def probed_sources(
    recipe: Recipe,
    base: ModelSource,
    models: Mapping[str, Path],
    teachers: Mapping[str, EncoderSpec],
    blocks: Sequence[int],
    conditions: Sequence[Condition],
    steps: int,
    pools: Sequence[int],
) -> Mapping[str, Source]:
    paths = {BASE: None} | dict(models)
    straw = {}
    if recipe.encoder is not None:
        straw = {
            PIXELS: _Teacher(recipe.encoder, recipe.data, steps, pools, pixels=True),
            UNTRAINED: _Teacher(Untrained(of=recipe.encoder), recipe.data, steps, pools),
        }
    names = [BASE, *models, *teachers, *straw]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(
            f"Two sources are called {', '.join(sorted(twice))}. Give each a name of its own."
        )
    return (
        {name: _Model(path, base, blocks, conditions, steps, pools) for name, path in paths.items()}
        | {name: _Teacher(spec, recipe.data, steps, pools) for name, spec in teachers.items()}
        | straw
    )


See = Callable[[Float[Tensor, "b f 3 h w"]], TokenGrid]


# Teachers and straw men.


def look(see: See, clips: Clips, what: str) -> TokenGrid:
    """The grid of all clips, in float32 on the CPU."""
    grids = [see(clips.video(which)) for which in track(clips.batches(), what)]
    return grids[0].with_tokens(torch.cat([grid.tokens.float().cpu() for grid in grids]))


def mean_colours(video: Float[Tensor, "b f 3 h w"], like: TokenGrid) -> TokenGrid:
    """Raw pixels, -1 to 1, averaged over what each token of `like` covers."""
    seen = video[:, max(0, like.start) :].transpose(1, 2) * 2 - 1
    return like.with_tokens(F.adaptive_avg_pool3d(seen, like.size).permute(0, 2, 3, 4, 1))


def straw_men(
    encoder: Encoder, features: TokenGrid, shown: Clips, balls: Clips | None
) -> list[Reading]:
    """How close raw pixels and the untrained teacher are to the teacher's features of `shown`; how
    well contact in `balls` is read from them and from the teacher. The encoder is untrained after.
    """

    def sources() -> Iterator[tuple[str, See]]:
        yield "teacher", encoder
        yield "pixels", lambda video: mean_colours(video, features)
        forget(encoder)
        yield "untrained", encoder

    readings = []
    for source, see in sources():
        if source != "teacher":
            near = closeness(look(see, shown, source), features)
            readings += [mean_reading(m, values, source) for m, values in near.items()]
        if balls is not None:
            readings.append(
                contact_reading(slices(look(see, balls, f"{source}, contact")), balls, source)
            )
    return readings
