"""How much physics features hold: whether a linear readout foresees, from a clip's beginning, that
two objects will touch (Physion), in models over timesteps and blocks, and in teachers."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

from videorepa.artifacts.finished import claim_folder, read_finished, write_finished
from videorepa.artifacts.model import Model as ModelSource
from videorepa.diffusion import STEPS
from videorepa.encoders import EncoderSpec
from videorepa.errors import UserError
from videorepa.probing.blocks import SLICES
from videorepa.probing.clips import ShownFrames
from videorepa.probing.comparison import (
    Decisions,
    ReadoutKey,
    accuracies,
    differences,
    prediction_rows,
)
from videorepa.probing.features import CHUNK, FeatureStore, extract
from videorepa.probing.physion import PROTOCOLS, Stimulus
from videorepa.probing.records import Accuracy, Difference
from videorepa.probing.sources import BASE, Condition, all_teachers, feature_key, probed_sources
from videorepa.recipe import Recipe
from videorepa.settings.sections import ClipSize
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.environment import environment
from videorepa.system.files import atomic_write, csv_text
from videorepa.system.fingerprint import file_sample_digest, json_digest
from videorepa.system.progress import track

FORMAT = 1
"""Raised whenever the same clips and models would give other features or another readout."""

PARTS = "probe-parts"


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
    sources = probed_sources(recipe, base, models or {}, known, numbers, conditions, steps, sides)
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
    cut = ShownFrames(size, shown, recipe.data.prepare_batch, recipe.seed)
    stores = {
        name: FeatureStore(out / PARTS / "features", name, source, clips | source.made_with())
        for name, source in sources.items()
    }
    claim_folder(out, PARTS, "probe")
    for store in stores.values():
        store.open()
    for name, store in stores.items():
        extract(name, store, chunks, cut, where, dtype)

    readouts = {}
    for name, store in stores.items():
        for condition in store.source.conditions:
            for block in store.source.blocks:
                for pool in sides:
                    key = ReadoutKey(name, block, condition, pool)
                    readouts[key] = _Readout(
                        out / PARTS / "readouts", key, store, kind.name, left_out, stimuli
                    )
    missing = [readout for readout in readouts.values() if readout.read() is None]
    for readout in track(missing, "read out", done=len(readouts) - len(missing)):
        readout.do(chunks)
    decided = {key: readout.decided() for key, readout in readouts.items()}
    notes += sorted({note for store in stores.values() for note in store.failures(chunks)})

    of = {stimulus.id: stimulus for stimulus in stimuli}
    rows = [row for key, found in decided.items() for row in prediction_rows(key, found, of)]
    found = Probe(
        out=out,
        protocol=kind.name,
        sources=list(sources),
        scenarios=sorted({row["scenario"] for row in rows}),
        blocks=numbers,
        timesteps=times,
        pools=sides,
        against=against,
        accuracies=[a for key, found in decided.items() for a in accuracies(key, found, of)],
        differences=differences(decided, of, against),
        notes=notes,
    )
    _write(found, rows, recipe)
    return found


def read_names(path: Path) -> list[str]:
    """The lines of a text file. Raises UserError if it cannot be read."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    return [line.strip() for line in lines if line.strip()]


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


@dataclass(frozen=True)
class _Readout:
    """One fit, or one for each scenario, kept when it is done."""

    folder: Path
    key: ReadoutKey
    store: FeatureStore
    protocol: str
    left_out: set[str]
    stimuli: Sequence[Stimulus]

    @property
    def _path(self) -> Path:
        pieces = (
            self.store.path.name,
            feature_key(self.key.block, self.key.pool),
            self.key.condition,
        )
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

    def read(self) -> Decisions | None:
        return read_finished(self._path, self._made_with, lambda found: Decisions(**found))

    def decided(self) -> Decisions:
        found = self.read()
        assert found is not None
        return found

    def do(self, chunks: Sequence[Sequence[Stimulus]]) -> None:
        key = feature_key(self.key.block, self.key.pool)
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
        write_finished(self._path, self._made_with, asdict(Decisions(scores, strengths)))


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
