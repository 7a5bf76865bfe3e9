"""Measures how much physics features hold.

The question is Physion's: can a linear readout predict from a clip's beginning that two objects
will touch?
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from videorepa.artifacts.finished import claim_folder, read_finished, write_finished
from videorepa.data.video import READER
from videorepa.diffusion import STEPS
from videorepa.encoders import EncoderSpec
from videorepa.errors import UserError, within_memory
from videorepa.probing.clips import ShownFrames
from videorepa.probing.comparison import (
    Decisions,
    ReadoutKey,
    accuracies,
    differences,
    prediction_rows,
)
from videorepa.probing.features import CHUNK, Chunk, FeatureStore
from videorepa.probing.physion import (
    PROTOCOLS,
    FrameChoice,
    Protocol,
    StepsRead,
    Stimulus,
    split,
)
from videorepa.probing.projectors import may_have_projector
from videorepa.probing.records import Probe
from videorepa.probing.sources import (
    BASE,
    SLICES,
    Condition,
    FeatureSource,
    ModelFeatures,
    Pooling,
    check_blocks,
    feature_key,
    probed_sources,
)
from videorepa.recipe import Recipe
from videorepa.remedies import in_encoding
from videorepa.settings.sections import ClipSize
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.environment import environment
from videorepa.system.files import atomic_write, csv_text, read_text
from videorepa.system.fingerprint import file_sample_digest, json_digest
from videorepa.system.progress import track
from videorepa.system.wording import listed

FORMAT = 1
"""Raised whenever the same clips and models would give other features or other readouts."""

MOST = 1_000
"""Most draws of noise, and most steps in time."""

PARTS = "probe-parts"
"""Folder of features and readouts. A folder that has it is recognised as a probe's."""


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
    steps: int | None = None,
    pools: Sequence[int] = (1, 4),
    frames: FrameChoice = "resampled",
    through_projector: bool = False,
    leave_out: Sequence[str] = (),
    against: str = BASE,
    device: str | None = None,
) -> Probe:
    """Predict contact from the features of models and teachers, by Physion's readout.

    Every source sees the same clip: the recipe's number of frames, taken evenly from what Physion
    shows and resized to the recipe's size without cropping. Models see it encoded, noised, and with
    an empty prompt; the noise depends on clip and draw alone. The teachers see it clean, and so do
    two straw men: raw pixels on the grid of the recipe's teacher, and that teacher untrained. The
    features are the tokens of a few steps in time of the output of a block or an encoder.

    `out` gets probe.json, accuracies.csv, differences.csv and predictions.csv, which has every
    clip. Features and readouts that are there are not made again.

    Args:
        recipe: Its base model and its teacher are the first sources.
        data: Folder with `train` and `test`, each as published.
        out: Folder of the probe.
        protocol: "v1.5", "2021", "lab", or "videorepa" for v1.5 as VideoREPA's author read it.
        models: Further models by name: runs, recipes or diffusers folders.
        teachers: Further teachers by name.
        blocks: Numbers of the blocks, counted from 1; by default those that the recipe aligns.
        timesteps: Timesteps of the noise, 0 to 999.
        draws: How many noises each clip is read with.
        steps: How many evenly spaced steps in time are read; by default 3. The protocol "videorepa"
            has its own.
        pools: Sizes of the grids that each step's tokens are averaged to, in rows and columns; each
            gets a readout of its own. At most the size of the base model's grid.
        frames: "resampled" takes frames evenly from all that Physion shows, "published" only from
            those that the published extractors see. "padded" takes each once, after copies of the
            first.
        through_projector: Read every further model through the projector that was trained on the
            block. The base has none. The protocol "videorepa" does so with those that have one.
        leave_out: File names of test clips that do not count.
        against: The source that others are compared with.
        device: Where to compute; by default the first GPU, or the CPU.

    Raises:
        UserError: `out` holds something else or what was made differently, a number is out of
            range, a source cannot be opened, or there are too few clips.
    """
    kind = PROTOCOLS.get(protocol)
    if kind is None:
        raise UserError(f"Physion has the protocols {', '.join(PROTOCOLS)}; got {protocol!r}.")
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)
    numbers = recipe.aligned_blocks if blocks is None else sorted(set(blocks))
    if blocks is None and not numbers:
        raise UserError(f"The recipe {recipe.name} aligns no block; say which to read: --blocks.")
    times, sides = sorted(set(timesteps)), sorted(set(pools))
    if kind.steps is not None and steps is not None:
        raise UserError(
            f"The protocol {kind.name} reads {kind.steps.models} steps of models and "
            f"{kind.steps.encoders} of encoders. Leave out --steps, or choose another protocol."
        )
    count = SLICES if steps is None else steps
    read = kind.steps or StepsRead(count, count)
    _check(recipe, numbers, times, draws, min(read), sides)
    further = models or {}
    if through_projector and not further:
        raise UserError("No model is there to be read through a projector. Name some: --models.")
    sources = probed_sources(
        recipe,
        further,
        teachers or {},
        numbers,
        [Condition(t, draw) for t in times for draw in range(draws)],
        *(Pooling(each, sides, are_distinct=kind.steps is not None) for each in read),
        projected=[
            name
            for name, path in further.items()
            if through_projector or (kind.through_projector and may_have_projector(path))
        ],
    )
    if against not in sources:
        raise UserError(f"There is no source {against!r} to compare with: {', '.join(sources)}.")
    stimuli, notes = kind.read(data)
    notes += _unlike(sources, against)
    by_id = {stimulus.id: stimulus for stimulus in stimuli}
    left_out = {Path(name).stem for name in leave_out}
    if unknown := sorted(left_out - {s.stem for s in stimuli if s.is_test}):
        notes.append(f"Not there, though named to be left out: {', '.join(unknown)}.")
    kind.check(*split(stimuli, left_out))

    size = ClipSize(**recipe.data.model_dump(include=set(ClipSize.model_fields)))
    shown = {
        scenario: kind.shown(scenario, size.frames, frames)
        for scenario in sorted({stimulus.scenario for stimulus in stimuli})
    }
    made_with = {
        "format": FORMAT,
        "clips": json_digest([[s.id, s.scenario, file_sample_digest(s.path)] for s in stimuli]),
        "reader": READER,
        "shown": shown,
        "size": list(size.model_dump().values()),
        "precision": str(dtype),
        "seed": recipe.seed,
        "pools": sides,
    }
    stores = {
        name: FeatureStore(out / PARTS / "features", name, source, made_with | source.made_with())
        for name, source in sources.items()
    }
    claim_folder(out, PARTS, "probe")
    for store in stores.values():
        store.open()
    chunks = [stimuli[first : first + CHUNK] for first in range(0, len(stimuli), CHUNK)]
    shown_frames = ShownFrames(size, shown, recipe.data.prepare_batch)
    # The cheapest sources come last in the table and first here, since only reading the clips tells
    # how many there are to fit to.
    for store in reversed(stores.values()):
        with within_memory(in_encoding(recipe)):
            store.extract(chunks, shown_frames, where, dtype)
        lost = store.failures(chunks)
        kind.check(*split([s for s in stimuli if s.id not in lost], left_out), lost)

    folder = out / PARTS / "readouts"
    readouts = [
        _Readout(folder, ReadoutKey(name, block, condition, side), store, kind, left_out)
        for name, store in stores.items()
        for condition in store.source.conditions
        for block in store.source.blocks
        for side in sides
    ]
    decided = {
        readout.key: readout.read(by_id) or readout.fit(by_id, chunks)
        for readout in track(readouts, "read out")
    }
    rows = [row for key, each in decided.items() for row in prediction_rows(key, each, by_id)]
    measured = Probe(
        protocol=kind.name,
        sources=list(sources),
        scenarios=sorted({row["scenario"] for row in rows}),
        blocks=numbers,
        timesteps=times,
        pools=sides,
        steps={
            name: of.step
            for name, of in sources.items()
            if isinstance(of, ModelFeatures) and of.step is not None
        },
        against=against,
        accuracies=[a for key, each in decided.items() for a in accuracies(key, each, by_id)],
        differences=differences(decided, by_id, against),
        notes=notes,
        failures={
            clip: why for store in stores.values() for clip, why in store.failures(chunks).items()
        },
        recipe=recipe.text(),
        environment=environment(),
    )
    atomic_write(out / "predictions.csv", csv_text(list(rows[0]), rows))
    measured.write(out)
    return measured


def read_names(path: Path) -> list[str]:
    """Read the lines of a text file that are not empty. Raises UserError if it cannot be read."""
    try:
        lines = read_text(path).splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as text: {error}") from None
    return [line.strip() for line in lines if line.strip()]


def _unlike(sources: Mapping[str, FeatureSource], against: str) -> list[str]:
    """A note if models that are read through projectors are compared with one that is not."""
    models = {name: of for name, of in sources.items() if isinstance(of, ModelFeatures)}
    projected = [name for name, model in models.items() if model.through_projector]
    if not projected or against not in models or against in projected:
        return []
    return [
        f"{listed(projected)} {'are' if len(projected) > 1 else 'is'} read through a trained "
        f"projector and {against} is not, so their differences are also what a projector does. "
        "Compare with a control that is read through its own: --against."
    ]


def _check(
    recipe: Recipe,
    blocks: Sequence[int],
    timesteps: Sequence[int],
    draws: int,
    steps: int,
    pools: Sequence[int],
) -> None:
    shapes = recipe.backbone.shapes(recipe.data)
    check_blocks(blocks, shapes.blocks)
    if not timesteps or timesteps[0] < 0 or timesteps[-1] >= STEPS:
        raise UserError(f"Timesteps are 0 to {STEPS - 1}, one or more; got {list(timesteps)}.")
    if min(draws, steps, *pools, len(pools)) < 1 or max(draws, steps) > MOST:
        raise UserError(
            f"A probe needs one or more draws, steps and pools, and at most {MOST:,}; got {draws}, "
            f"{steps} and {list(pools)}."
        )
    _, height, width = shapes.grid.size
    if pools[-1] > min(height, width):
        raise UserError(
            f"The base model has {height}x{width} tokens a step, so pools are 1 to "
            f"{min(height, width)}; got {list(pools)}. Choose others with --pools."
        )


@dataclass(frozen=True)
class _Readout:
    """A readout of one kind of features, whose decisions are kept in one file."""

    folder: Path
    key: ReadoutKey
    store: FeatureStore
    protocol: Protocol
    left_out: set[str]

    @property
    def _path(self) -> Path:
        feature = feature_key(self.key.block, self.key.pool)
        name = f"{self.store.path.name}-{feature}-{self.key.condition}"
        return self.folder / f"{name.replace(', ', '-').replace(' ', '')}.json"

    def _made_with(self, stimuli: Mapping[str, Stimulus]) -> dict[str, Any]:
        return self.store.made_with | {
            "protocol": self.protocol.name,
            "labels": json_digest({clip: stimulus.touches for clip, stimulus in stimuli.items()}),
            "left out": sorted(self.left_out),
        }

    def read(self, stimuli: Mapping[str, Stimulus]) -> Decisions | None:
        """Return None if it is yet to be fitted. Raises UserError if it is stale or damaged."""
        return read_finished(
            self._path, self._made_with(stimuli), lambda content: Decisions(**content)
        )

    def fit(self, stimuli: Mapping[str, Stimulus], chunks: Sequence[Chunk]) -> Decisions:
        """Fit to the training clips, and write the decisions on the test clips."""
        key = feature_key(self.key.block, self.key.pool)
        ids, features = self.store.read(self.key.condition, key, chunks)
        fitted, unseen = split([stimuli[clip] for clip in ids], self.left_out)
        row = {clip: n for n, clip in enumerate(ids)}
        score, strengths = self.protocol.decide(
            features[[row[clip.id] for clip in fitted]],
            fitted,
            features[[row[clip.id] for clip in unseen]],
            unseen,
        )
        scores = {clip.id: float(value) for clip, value in zip(unseen, score, strict=True)}
        decisions = Decisions(scores, strengths)
        write_finished(self._path, self._made_with(stimuli), asdict(decisions))
        return decisions
