"""How much physics features hold: whether a linear readout foresees, from a clip's beginning, that
two objects will touch (Physion), in models over timesteps and blocks, and in teachers."""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from videorepa.benchmarks import compare_flags
from videorepa.data.batches import generator
from videorepa.data.files import atomic_write, csv_text, short_name
from videorepa.data.fingerprint import file_sample_digest, json_digest
from videorepa.data.parts import read_part, take, write_part
from videorepa.data.video import read_chosen
from videorepa.device import compute_dtype, pick_device
from videorepa.diffusion import STEPS
from videorepa.encoders import EncoderSpec
from videorepa.encoders.untrained import Untrained
from videorepa.errors import ClipError, UserError
from videorepa.generate import Source as ModelSource
from videorepa.measure import (
    SLICES,
    Clips,
    Encoded,
    Student,
    check_finite,
    draw_latents,
    draw_noise,
    mean_colours,
    slices,
)
from videorepa.physion import PROTOCOLS, Stimulus
from videorepa.progress import track
from videorepa.readings import Accuracy, Difference
from videorepa.recipe import ClipSize, Recipe
from videorepa.run import environment
from videorepa.scan import all_teachers
from videorepa.statistics import clopper_pearson, holm
from videorepa.tokens import TokenGrid

FORMAT = 1
"""Raised whenever the same clips and models would give other features or another readout."""
PARTS = "probe-parts"
CHUNK = 16
"""Clips whose features are kept in one file."""
LARGEST = float(np.finfo(np.float16).max)
BASE, PIXELS, UNTRAINED = "base", "pixels", "untrained"


class Condition(NamedTuple):
    """The noise that a model is given: its timestep, and the how-many-th draw it is. Both None for
    what is given the clean clip."""

    timestep: int | None = None
    draw: int | None = None

    def __str__(self) -> str:
        return "clean" if self.timestep is None else f"t{self.timestep:03d}-draw{self.draw}"


@dataclass(frozen=True)
class Probe:
    """What a probe found. against: the source that others are compared with."""

    out: Path
    protocol: str
    sources: list[str]
    scenarios: list[str]
    blocks: list[int]
    timesteps: list[int]
    pools: list[int]
    against: str
    accuracies: list[Accuracy]
    differences: list[Difference]
    notes: list[str]


def probe(
    recipe: Recipe,
    data: Path,
    out: Path,
    *,
    protocol: str = "v1.5",
    models: Mapping[str, Path] | None = None,
    teachers: Mapping[str, EncoderSpec] | None = None,
    blocks: Sequence[int] | None = None,
    timesteps: Sequence[int] = tuple(range(0, 501, 50)),
    draws: int = 3,
    steps: int = SLICES,
    pools: Sequence[int] = (1, 4),
    frames: Literal["resampled", "published"] = "resampled",
    leave_out: Sequence[str] = (),
    against: str = BASE,
    device: str | None = None,
) -> Probe:
    """Read contact from the recipe's base model, further models and teachers, by Physion's readout.

    Every source sees the same clip: the recipe's number of frames, evenly taken from what Physion
    shows and resized whole to the recipe's size. A model is given it encoded, noised at each of
    `timesteps` with noise that depends on clip and draw alone, with an empty prompt; a teacher is
    given it clean. Features are the tokens of a block's, or the teacher's, output at `steps` evenly
    spaced steps in time, each averaged to a grid of `pools` rows and columns.

    data: a folder with `train` and `test`, each as published. protocol: "v1.5" or "2021".
    models: further ones by name: runs, recipes or diffusers folders. teachers: beside the recipe's;
        raw pixels on the recipe's teacher's grid and that teacher untrained are read too.
    blocks: counted from 1; by default those that the recipe aligns.
    draws: how many noises each clip is read with.
    frames: "published" shows only the frames that published extractors are given.
    leave_out: stems of test clips that do not count. against: what others are compared with.

    `out` gets probe.json, accuracies.csv, differences.csv and predictions.csv, which has every
    clip. Features and readouts that are there are kept. Raises UserError if those were made
    otherwise, if `out` holds something else, and for what cannot be read out.
    """
    kind = PROTOCOLS.get(protocol)
    if kind is None:
        raise UserError(f"Physion has the protocols {', '.join(PROTOCOLS)}; got {protocol!r}.")
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)
    known = {} if recipe.encoder is None and not teachers else all_teachers(recipe, teachers or {})
    numbers = sorted(set(_aligned(recipe) if blocks is None else blocks))
    times, sides = sorted(set(timesteps)), sorted(set(pools))
    _check(recipe, numbers, times, draws, steps, sides)
    conditions = [Condition(t, draw) for t in times for draw in range(draws)]
    base = ModelSource(
        recipe.name, recipe.backbone, recipe.data, recipe.generation, recipe.train.precision
    )
    sources = _sources(recipe, base, models or {}, known, numbers, conditions, steps, sides)
    if against not in sources:
        raise UserError(f"There is no source {against!r} to compare with: {', '.join(sources)}.")
    stimuli, notes = kind.read(data)
    left_out = {Path(name).stem for name in leave_out}
    if unknown := sorted(left_out - {s.stem for s in stimuli if s.is_test}):
        notes.append(f"{len(unknown)} clips to be left out are not there: {', '.join(unknown)}.")

    # What is shown, and by what it is known.
    size = ClipSize(**recipe.data.model_dump(include=set(ClipSize.model_fields)))
    shown = {
        scenario: kind.shown(scenario, size.frames, frames == "published")
        for scenario in {stimulus.scenario for stimulus in stimuli}
    }
    clips = {
        "format": FORMAT,
        "clips": json_digest([[s.id, s.scenario, file_sample_digest(s.path)] for s in stimuli]),
        "shown": shown,
        "size": list(size.model_dump().values()),
        "precision": str(dtype),
        "seed": recipe.seed,
    }
    chunks = [stimuli[first : first + CHUNK] for first in range(0, len(stimuli), CHUNK)]
    cut = _Cut(size, shown, recipe.data.prepare_batch, recipe.seed)
    stores = {
        name: _Store(out / PARTS / "features", name, source, clips | source.made_with())
        for name, source in sources.items()
    }
    take(out, PARTS, "probe")
    for store in stores.values():
        store.open()
    for name, store in stores.items():
        _extract(name, store, chunks, cut, where, dtype)

    readouts = {}
    for name, store in stores.items():
        for condition in store.source.conditions:
            for block in store.source.blocks:
                for pool in sides:
                    key = _Key(name, block, condition, pool)
                    readouts[key] = _Readout(
                        out / PARTS / "readouts", key, store, kind.name, left_out, stimuli
                    )
    missing = [readout for readout in readouts.values() if readout.read() is None]
    for readout in track(missing, "read out", done=len(readouts) - len(missing)):
        readout.do(chunks)
    decided = {key: readout.decided() for key, readout in readouts.items()}
    notes += sorted({note for store in stores.values() for note in store.failures(chunks)})

    of = {stimulus.id: stimulus for stimulus in stimuli}
    rows = [row for key, found in decided.items() for row in _rows(key, found, of)]
    found = Probe(
        out=out,
        protocol=kind.name,
        sources=list(sources),
        scenarios=sorted({row["scenario"] for row in rows}),
        blocks=numbers,
        timesteps=times,
        pools=sides,
        against=against,
        accuracies=[a for key, found in decided.items() for a in _accuracies(key, found, of)],
        differences=_differences(decided, of, against),
        notes=notes,
    )
    _write(found, rows, recipe)
    return found


def named(models: Sequence[Path]) -> dict[str, Path]:
    """Models by the names of their folders or files, or by their whole paths where names are the
    same."""
    names = [short_name(path) for path in models]
    return {
        name if names.count(name) == 1 else str(path): path
        for name, path in zip(names, models, strict=True)
    }


def read_names(path: Path) -> list[str]:
    """The lines of a text file. Raises UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    return [line.strip() for line in lines if line.strip()]


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
        self, clips: Clips, ids: Sequence[str], conditions: Sequence[Condition], cut: _Cut
    ) -> Iterator[tuple[Condition, dict[str, Float[np.ndarray, "n d"]]]]:
        """Features of the clips by their keys (`_key`), for each condition."""
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
        return _LiveModel(self, Student(backbone, self.blocks), text)


@dataclass(frozen=True)
class _LiveModel:
    model: _Model
    student: Student
    text: dict[str, torch.Tensor]

    def see(
        self, clips: Clips, ids: Sequence[str], conditions: Sequence[Condition], cut: _Cut
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
        self, clips: Clips, ids: Sequence[str], conditions: Sequence[Condition], cut: _Cut
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
    return {_key(block, pool): slices(grid, steps, pool) for pool in pools}


def _key(block: int | None, pool: int) -> str:
    return f"pool {pool}" if block is None else f"block {block}, pool {pool}"


def _sources(
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


def _aligned(recipe: Recipe) -> list[int]:
    found = [term.block for term in recipe.terms.values() if isinstance(term.block, int)]
    if not found:
        raise UserError(f"The recipe {recipe.name} aligns no block; say which to read: --blocks.")
    return found


def _check(
    recipe: Recipe,
    blocks: Sequence[int],
    timesteps: Sequence[int],
    draws: int,
    steps: int,
    pools: Sequence[int],
) -> None:
    existing = recipe.backbone.shapes(recipe.data).blocks
    if not blocks or blocks[0] < 1 or blocks[-1] > existing:
        raise UserError(
            f"The base model's blocks are numbered 1 to {existing}; got "
            f"{', '.join(map(str, blocks)) or 'none'}."
        )
    if not timesteps or timesteps[0] < 0 or timesteps[-1] >= STEPS:
        raise UserError(f"Timesteps are 0 to {STEPS - 1}, one or more; got {list(timesteps)}.")
    if min(draws, steps, *pools, len(pools)) < 1:
        raise UserError(
            f"A probe wants one or more draws, steps and pools; got {draws}, {steps} and "
            f"{list(pools)}."
        )


# Features, kept as they come.


@dataclass(frozen=True)
class _Cut:
    """What of a clip is shown. shown: numbers of frames by scenario. batch: clips that go through a
    model at once. seed: of latents and noise."""

    size: ClipSize
    shown: Mapping[str, Sequence[int]]
    batch: int
    seed: int

    def read(self, chunk: Sequence[Stimulus]) -> tuple[Clips | None, list[str], dict[str, str]]:
        """The clips that can be read, their ids, and why others cannot."""
        frames, ids, failed = [], [], {}
        for stimulus in chunk:
            try:
                numbers = self.shown[stimulus.scenario]
                frames.append(
                    read_chosen(stimulus.path, numbers, self.size.height, self.size.width)
                )
                ids.append(stimulus.id)
            except ClipError as error:
                failed[stimulus.id] = str(error)
        clips = Clips(np.stack(frames), [""] * len(ids), "", self.batch) if ids else None
        return clips, ids, failed


class _Store:
    """A source's features: a folder for each condition, a file for each chunk of clips."""

    def __init__(self, root: Path, name: str, source: Source, made_with: dict[str, Any]) -> None:
        self.path = root / re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        self.source, self.made_with = source, made_with

    def open(self) -> None:
        """Raises UserError if it is another source's, or of other clips."""
        about = self.path / "made-with.json"
        if read_part(about, self.made_with, lambda _: True) is None:
            if any(self.path.rglob("*.safetensors")):
                raise UserError(
                    f"{self.path} holds features but not what they were made with. Delete it; the "
                    "same command makes them again."
                )
            write_part(about, self.made_with, None)

    def file(self, condition: Condition, chunk: Sequence[Stimulus]) -> Path:
        # Named by the clips in it, as digests are short.
        return self.path / str(condition) / f"{json_digest([s.id for s in chunk])}.safetensors"

    def missing(self, chunk: Sequence[Stimulus]) -> list[Condition]:
        return [c for c in self.source.conditions if not self.file(c, chunk).exists()]

    def write(
        self,
        condition: Condition,
        chunk: Sequence[Stimulus],
        ids: Sequence[str],
        failed: Mapping[str, str],
        features: Mapping[str, Float[np.ndarray, "n d"]],
    ) -> None:
        path = self.file(condition, chunk)
        path.parent.mkdir(exist_ok=True)
        about = json.dumps({"ids": list(ids), "failed": dict(failed)})
        # As v1.5 does; what does not fit becomes the largest that does.
        half = {
            key: values.clip(-LARGEST, LARGEST).astype(np.float16)
            for key, values in features.items()
        }
        atomic_write(path, save(half, metadata={"about": about}))

    def read(
        self, condition: Condition, key: str, chunks: Sequence[Sequence[Stimulus]]
    ) -> tuple[list[str], Float[np.ndarray, "n d"]]:
        """Ids, and features in their order."""
        ids: list[str] = []
        parts = []
        for chunk in chunks:
            with self._opened(condition, chunk) as file:
                there = _about(file)["ids"]
                if there:
                    parts.append(file.get_tensor(key))
                ids += there
        if not parts:
            raise UserError("None of Physion's clips can be read.")
        return ids, np.concatenate(parts).astype(np.float32)

    def failures(self, chunks: Sequence[Sequence[Stimulus]]) -> list[str]:
        notes = []
        for chunk in chunks:
            with self._opened(self.source.conditions[0], chunk) as file:
                failed = _about(file)["failed"]
            notes += [f"The clip {name} was left out: {why}." for name, why in failed.items()]
        return notes

    def _opened(self, condition: Condition, chunk: Sequence[Stimulus]) -> Any:
        path = self.file(condition, chunk)
        try:
            return safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}). Delete it; the same command makes it again."
            ) from None


def _about(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["about"])


def _extract(
    name: str,
    store: _Store,
    chunks: Sequence[Sequence[Stimulus]],
    cut: _Cut,
    where: torch.device,
    dtype: torch.dtype,
) -> None:
    todo = [chunk for chunk in chunks if store.missing(chunk)]
    if not todo:
        return
    live = store.source.load(where, dtype)
    for chunk in track(todo, name, done=len(chunks) - len(todo)):
        clips, ids, failed = cut.read(chunk)
        conditions = store.missing(chunk)
        if clips is None:
            for condition in conditions:
                store.write(condition, chunk, [], failed, {})
            continue
        for condition, features in live.see(clips, ids, conditions, cut):
            for key, values in features.items():
                check_finite(values, f"{name}, {key}, {condition}")
            store.write(condition, chunk, ids, failed, features)


# Readouts.


class _Key(NamedTuple):
    source: str
    block: int | None
    condition: Condition
    pool: int


@dataclass(frozen=True)
class _Decided:
    """score: of each test clip by id, above 0 for a yes. strengths: by scenario."""

    score: dict[str, float]
    strengths: dict[str, float]


@dataclass(frozen=True)
class _Readout:
    """One fit, or one for each scenario, kept when it is done."""

    folder: Path
    key: _Key
    store: _Store
    protocol: str
    left_out: set[str]
    stimuli: Sequence[Stimulus]

    @property
    def _path(self) -> Path:
        pieces = (self.store.path.name, _key(self.key.block, self.key.pool), self.key.condition)
        name = "-".join(str(piece).replace(", ", "-").replace(" ", "") for piece in pieces)
        return self.folder / f"{name}.json"

    @property
    def _made_with(self) -> dict[str, Any]:
        labels = {stimulus.id: stimulus.touches for stimulus in self.stimuli}
        return self.store.made_with | {
            "protocol": self.protocol,
            "labels": json_digest(labels),
            "left out": sorted(self.left_out),
        }

    def read(self) -> _Decided | None:
        return read_part(self._path, self._made_with, lambda found: _Decided(**found))

    def decided(self) -> _Decided:
        found = self.read()
        assert found is not None
        return found

    def do(self, chunks: Sequence[Sequence[Stimulus]]) -> None:
        key = _key(self.key.block, self.key.pool)
        ids, features = self.store.read(self.key.condition, key, chunks)
        of = {stimulus.id: stimulus for stimulus in self.stimuli}
        clips = [of[name] for name in ids]
        fitted = [n for n, clip in enumerate(clips) if not clip.is_test]
        unseen = [
            n for n, clip in enumerate(clips) if clip.is_test and clip.stem not in self.left_out
        ]
        if not unseen:
            raise UserError("No test clip is left to be judged.")
        score, strengths = PROTOCOLS[self.protocol].decide(
            features[fitted],
            [clips[n] for n in fitted],
            features[unseen],
            [clips[n] for n in unseen],
        )
        scores = {ids[n]: float(value) for n, value in zip(unseen, score, strict=True)}
        write_part(self._path, self._made_with, asdict(_Decided(scores, strengths)))


def _rows(key: _Key, found: _Decided, of: Mapping[str, Stimulus]) -> Iterator[dict[str, Any]]:
    """A row for each test clip, as predictions.csv has it."""
    for name, score in found.score.items():
        yield {
            "source": key.source,
            "block": key.block,
            "timestep": key.condition.timestep,
            "draw": key.condition.draw,
            "pool": key.pool,
            "clip": of[name].stem,
            "scenario": of[name].scenario,
            "touches": of[name].touches,
            "score": score,
            "right": (score > 0) == of[name].touches,
        }


def _accuracies(key: _Key, found: _Decided, of: Mapping[str, Stimulus]) -> Iterator[Accuracy]:
    rows = list(_rows(key, found, of))
    by_scenario = defaultdict(list)
    for row in rows:
        by_scenario[row["scenario"]].append(row)
    where = Accuracy(
        key.source, key.block, key.condition.timestep, key.condition.draw, key.pool, "", 0.0
    )
    percents = []
    for scenario, mine in [*sorted(by_scenario.items()), ("all", rows)]:
        right, n = sum(row["right"] for row in mine), len(mine)
        low, high = clopper_pearson(right, n)
        percents.append(100.0 * right / n)
        yield replace(
            where,
            scenario=scenario,
            percent=percents[-1],
            low=100 * low,
            high=100 * high,
            right=right,
            n=n,
            touch=sum(row["touches"] for row in mine),
            strength=found.strengths.get(scenario),
        )
    yield replace(where, scenario="mean", percent=float(np.mean(percents[:-1])))


def _differences(
    decided: Mapping[_Key, _Decided], of: Mapping[str, Stimulus], against: str
) -> list[Difference]:
    """Every source minus the one to compare with, at the same block, timestep, draw and pool; a
    source without noise is the same in all draws."""
    flags: dict[tuple[str, int | None, int | None, int], dict[int | None, list]] = defaultdict(dict)
    for key, found in decided.items():
        place = (key.source, key.block, key.condition.timestep, key.pool)
        flags[place][key.condition.draw] = list(_rows(key, found, of))
    found = []
    for place, ours in flags.items():
        for other, theirs in flags.items():
            if other[0] == against != place[0] and _meet(place, other):
                found += _compare(place, ours, other, theirs)
    return _adjusted(found)


def _meet(a: tuple, b: tuple) -> bool:
    """Whether two places differ in the source alone, or in what one of them does not have."""
    return a[3] == b[3] and all(
        mine == theirs or None in (mine, theirs)
        for mine, theirs in zip(a[1:3], b[1:3], strict=True)
    )


def _compare(
    place: tuple, ours: Mapping[int | None, list], other: tuple, theirs: Mapping[int | None, list]
) -> Iterator[Difference]:
    draws = sorted({draw for draw in (*ours, *theirs) if draw is not None}) or [0]

    def clips(sides: Mapping[int | None, list], scenario: str) -> list[dict[str, Any]]:
        return [
            row | {"prompt_id": row["clip"], "k": draw}
            for draw in draws
            for row in sides[draw if draw in sides else None]
            if scenario in ("all", row["scenario"])
        ]

    source, block, timestep, pool = place
    against, their_block, their_timestep, _ = other
    for scenario in [*sorted({row["scenario"] for rows in ours.values() for row in rows}), "all"]:
        # The other is A: the difference is ours minus theirs.
        both = compare_flags(clips(theirs, scenario), clips(ours, scenario), ["right"])["right"]
        yield Difference(
            source=source,
            against=against,
            block=block or their_block,
            timestep=timestep if timestep is not None else their_timestep,
            pool=pool,
            scenario=scenario,
            difference=both["difference"],
            low=both["low"],
            high=both["high"],
            n=both["n"],
            only_source=both["only_b"],
            only_against=both["only_a"],
            p=both["p"],
            p_holm=float("nan"),
        )


def _adjusted(differences: Sequence[Difference]) -> list[Difference]:
    families: dict[tuple, list[Difference]] = defaultdict(list)
    for found in differences:
        families[found.source, found.block, found.pool].append(found)
    return [
        replace(found, p_holm=p)
        for family in families.values()
        for found, p in zip(family, holm([found.p for found in family]), strict=True)
    ]


# What is said and written of it.


def table(found: Probe) -> str:
    """For each pool and scenario: a line per source with its accuracy over timesteps, the mean of
    the draws, and one with what it differs by from the source to compare with. What is given no
    noise stands in the last column."""
    lines = []
    for pool in found.pools:
        for scenario in [*found.scenarios, "all", "mean"]:
            lines += _panel(found, pool, scenario)
    return "\n".join([*lines, *found.notes])


def _panel(found: Probe, pool: int, scenario: str) -> Iterator[str]:
    here = [a for a in found.accuracies if (a.pool, a.scenario) == (pool, scenario)]
    differences = [d for d in found.differences if (d.pool, d.scenario) == (pool, scenario)]
    counted = f": {here[0].n} clips, of which {here[0].touch} touch"
    yield f"{scenario}, {pool}x{pool}{counted if scenario != 'mean' else ' over scenarios'}"
    columns = [*found.timesteps, None]
    yield _line("timestep", ["clean" if column is None else str(column) for column in columns])
    for source, block in dict.fromkeys((a.source, a.block) for a in here):
        name = source if block is None else f"{source}, block {block}"
        mine = [(a.timestep, a.percent) for a in here if (a.source, a.block) == (source, block)]
        yield _line(name, _cells(columns, "{:.1f}", mine))
        apart = [d for d in differences if d.source == source and block in (None, d.block)]
        for other in sorted({d.block or 0 for d in apart}):
            of = [d for d in apart if (d.block or 0) == other]
            name = f"  less {found.against}" + (
                f", block {other}" if block is None and other else ""
            )
            yield _line(name, _cells(columns, "{:+.1f}", [(d.timestep, d.difference) for d in of]))
            yield _line("  p", _cells(columns, "{:.3f}", [(d.timestep, d.p) for d in of]))
    widths = [a.high - a.low for a in here if a.low is not None and a.high is not None]
    if widths:
        yield f"Exact 95 % intervals are up to {max(widths):.1f} points wide."
    yield ""


def _cells(
    columns: Sequence[int | None], form: str, values: Sequence[tuple[int | None, float]]
) -> list[str]:
    """The mean of the values at each timestep."""
    at: dict[int | None, list[float]] = defaultdict(list)
    for timestep, value in values:
        at[timestep].append(value)
    return [form.format(np.mean(at[column])) if column in at else "" for column in columns]


def _line(name: str, cells: Sequence[str]) -> str:
    return f"{name:<24}{''.join(f'{cell:>7}' for cell in cells)}".rstrip()


def _write(found: Probe, rows: Sequence[dict[str, Any]], recipe: Recipe) -> None:
    for name, kind, items in (
        ("accuracies", Accuracy, found.accuracies),
        ("differences", Difference, found.differences),
    ):
        columns = [field.name for field in fields(kind)]
        atomic_write(found.out / f"{name}.csv", csv_text(columns, [asdict(item) for item in items]))
    atomic_write(found.out / "predictions.csv", csv_text(list(rows[0]), rows))
    content = {key: value for key, value in asdict(found).items() if key != "out"}
    content |= {"recipe": recipe.text(), "environment": environment()}
    atomic_write(found.out / "probe.json", json.dumps(content, indent=1))
