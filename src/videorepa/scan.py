"""Measures, before any training, how close each block is to each teacher, and how well either
foretells contact: what there is to choose the block to align by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import ValidationError

from videorepa import plugins
from videorepa.align import resample
from videorepa.data.files import atomic_write, csv_text
from videorepa.data.fingerprint import json_digest
from videorepa.data.parts import read_part, take, write_part
from videorepa.data.source import open_source
from videorepa.device import compute_dtype, pick_device
from videorepa.encoders import EncoderSpec
from videorepa.errors import ClipError, UserError
from videorepa.lab.contact import contact_clip
from videorepa.lab.world import FRAMES, SIZE
from videorepa.lab.world import VERSION as LAB_VERSION
from videorepa.measure import Clips, Student, encode, look, straw_men
from videorepa.readings import Reading
from videorepa.readout import FOLDS
from videorepa.recipe import Recipe
from videorepa.report import report
from videorepa.run import environment
from videorepa.tokens import TokenGrid

FORMAT = 1
"""Raised whenever the same clips and models would be measured otherwise."""
NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)
PARTS = "scan-parts"
"""Folder, in a scan's own, of what is finished; by it a scan's folder is known."""
NAMES = {"relation_error": "relation error", "cka": "CKA", "contact_auc": "contact AUC"}


@dataclass(frozen=True)
class Scan:
    """What a scan found.

    says: what was measured, in sentences. notes: what was left out, and why.
    """

    out: Path
    teachers: list[str]
    blocks: list[int]
    noise_levels: list[float]
    readings: list[Reading]
    notes: list[str]
    says: list[str]


def scan(
    recipe: Recipe,
    out: Path,
    *,
    teachers: Mapping[str, EncoderSpec] | None = None,
    clips: int = 12,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    blocks: Sequence[int] | None = None,
    probe_clips: int = 256,
    device: str | None = None,
) -> Scan:
    """Measure each block of the recipe's base model, at each noise level, against each teacher.

    The first `clips` readable clips of the recipe's data go, with their captions, through the base
    model and the teachers: relation error and CKA, see `videorepa.measure.closeness`. Whether two
    things will touch is read by a linear probe (`videorepa.readout`) from `probe_clips` clips of
    the lab's (`videorepa.lab.contact`), given without captions, if the recipe's clips are of the
    lab's size. Raw pixels and the untrained teacher stand beside both.

    teachers: further ones beside the recipe's encoder, each with a name.
    noise_levels: the noise's share of the noisy latents' variance; the nearest timestep is taken.
    blocks: counted from 1; by default all. probe_clips: 0 leaves the probe out.

    Nothing need be prepared. `out` gets scan.json, scan.csv and report.html. What is finished
    there, such as a noise level of a teacher, is kept. Raises UserError if that was measured
    otherwise, if `out` holds something else, for numbers out of range, and if fewer than two clips
    can be read.
    """
    known = all_teachers(recipe, teachers or {})
    shapes = recipe.backbone.shapes(recipe.data)
    levels = sorted(set(noise_levels))
    numbers = sorted(set(blocks)) if blocks is not None else list(range(1, shapes.blocks + 1))
    _check(levels, numbers, shapes.blocks, clips, probe_clips)
    for name, spec in known.items():
        _check_meeting(name, shapes.grid, spec.shape(recipe.data.frames))
    shown, notes = _readable_clips(recipe, clips)
    balls = None
    size = (recipe.data.frames, recipe.data.height, recipe.data.width)
    if size != (FRAMES, SIZE, SIZE):
        notes.append(
            f"Contact was not read: the probe's clips are the lab's, of {FRAMES}x{SIZE}x{SIZE}, "
            f"and the recipe's are of {'x'.join(map(str, size))}."
        )
    elif probe_clips:
        balls = _contact_clips(recipe, probe_clips)
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)

    parts = _parts(recipe, out / PARTS, known, levels, numbers, shown, balls, dtype)
    take(out, PARTS, "scan")
    todo = [part for part in parts if part.read() is None]
    _measure(recipe, todo, known, numbers, shown, balls, where, dtype)
    readings = [reading for part in parts for reading in part.read() or ()]
    says = _says(list(known), readings)
    found = Scan(out, list(known), numbers, levels, readings, notes, says)
    _write(found, recipe)
    return found


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


def _check(
    levels: list[float], blocks: list[int], existing: int, clips: int, probe_clips: int
) -> None:
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise UserError(f"Noise levels are shares from 0 to 1, one or more; got {levels}.")
    if not blocks or blocks[0] < 1 or blocks[-1] > existing:
        raise UserError(
            f"The base model's blocks are numbered 1 to {existing}; got "
            f"{', '.join(map(str, blocks)) or 'none'}."
        )
    if clips < 2:
        raise UserError(f"A scan wants 2 clips or more, to see how they spread; got {clips}.")
    if probe_clips % 2 or (probe_clips and probe_clips < 4 * FOLDS):
        raise UserError(
            f"The probe wants an even number of clips, {4 * FOLDS} or more, or 0 to be left out; "
            f"got {probe_clips}."
        )


def _check_meeting(name: str, student: TokenGrid, teacher: TokenGrid) -> None:
    try:
        resample(student, like=teacher)
    except UserError as error:
        raise UserError(f"The base model and the teacher {name} cannot meet. {error}") from None


def _readable_clips(recipe: Recipe, count: int) -> tuple[Clips, list[str]]:
    source = open_source(recipe.data)
    frames, captions, digests, notes = [], [], [], []
    for number, item in enumerate(source.items):
        if len(frames) == count:
            break
        try:
            digest = source.digest(number)
            frames.append(source.frames(number))
        except ClipError as error:
            notes.append(f"The clip {item.id!r} was left out: {error}.")
            continue
        captions.append(item.caption)
        digests.append([item.id, item.caption, digest])
    if len(frames) < 2:
        raise UserError(
            f"{len(frames)} of {len(source.items)} clips can be read; a scan wants 2 or more. "
            + " ".join(notes)
        )
    if len(frames) < count:
        notes.append(f"There are {len(frames)} clips to measure on, where {count} were asked for.")
    batch = recipe.data.prepare_batch
    return Clips(np.stack(frames), captions, json_digest(digests), batch), notes


def _contact_clips(recipe: Recipe, count: int) -> Clips:
    drawn = [contact_clip(recipe.seed, index) for index in range(count)]
    return Clips(
        frames=np.stack([clip.frames for clip, _ in drawn]),
        captions=[""] * count,
        digest=f"lab {LAB_VERSION}, seed {recipe.seed}, {count} clips",
        batch=recipe.data.prepare_batch,
        label=np.array([touches for _, touches in drawn]),
    )


# What is finished: a file for each part.


@dataclass(frozen=True)
class _Part:
    """What is measured and kept as one: a teacher's straw men (level None), a teacher at a noise
    level, or contact in the blocks at a noise level (teacher None)."""

    path: Path
    teacher: str | None
    level: float | None
    made_with: dict[str, Any]

    def read(self) -> list[Reading] | None:
        """None if it is still to be done. Raises UserError if it is stale or damaged."""

        def parse(rows: list[dict[str, Any]]) -> list[Reading]:
            return [replace(Reading(**row), teacher=self.teacher) for row in rows]

        return read_part(self.path, self.made_with, parse)

    def write(self, readings: Sequence[Reading]) -> None:
        write_part(self.path, self.made_with, [asdict(reading) for reading in readings])


def _parts(
    recipe: Recipe,
    folder: Path,
    teachers: Mapping[str, EncoderSpec],
    levels: Sequence[float],
    blocks: Sequence[int],
    shown: Clips,
    balls: Clips | None,
    dtype: torch.dtype,
) -> list[_Part]:
    data, backbone = recipe.data, recipe.backbone
    always = {
        "format": FORMAT,
        "size": [data.frames, data.height, data.width],
        "precision": str(dtype),
    }
    student = {
        "backbone": {"name": backbone.name, "transformer": backbone.weights_digest()}
        | backbone.fingerprint(),
        "blocks": list(blocks),
        "seed": recipe.seed,
    }
    clips = {"clips": shown.digest}
    contact = {"contact clips": balls.digest if balls else None}
    parts = []
    for name, spec in teachers.items():
        teacher = {"teacher": {"name": spec.name} | spec.fingerprint()}
        # The digest is of the teacher, so that another one of the same kind has its own files.
        file = folder / f"{spec.name}-{json_digest(teacher)}"
        made_with = always | teacher | clips | contact
        parts.append(_Part(file.with_name(f"{file.name}-straw-men.json"), name, None, made_with))
        for level in levels:
            path = file.with_name(f"{file.name}-noise-{level:g}.json")
            made_with = always | student | teacher | clips | {"noise": level}
            parts.append(_Part(path, name, level, made_with))
    for level in levels if balls else ():
        path = folder / f"contact-noise-{level:g}.json"
        parts.append(_Part(path, None, level, always | student | contact | {"noise": level}))
    return parts


def _measure(
    recipe: Recipe,
    todo: Sequence[_Part],
    teachers: Mapping[str, EncoderSpec],
    blocks: Sequence[int],
    shown: Clips,
    balls: Clips | None,
    where: torch.device,
    dtype: torch.dtype,
) -> None:
    """Do the parts, each kept when it is finished. No two models are in memory at once."""

    def seen_by(name: str) -> TokenGrid:
        encoder = teachers[name].load(where, dtype)
        grid = look(encoder, shown, name)
        for part in todo:
            if part.teacher == name and part.level is None:
                part.write(straw_men(encoder, grid, shown, balls))
        return grid

    features = {name: seen_by(name) for name in teachers if any(p.teacher == name for p in todo)}
    close = [part for part in todo if part.teacher and part.level is not None]
    probe = [part for part in todo if not part.teacher]
    if not close and not probe:
        return
    backbone = recipe.backbone.load(("vae", "text_encoder"), where, dtype)
    shown_in = encode(backbone, shown, recipe.seed)
    balls_in = encode(backbone, balls, recipe.seed) if balls and probe else None
    del backbone
    student = Student(recipe.backbone.load(("transformer",), where, dtype), blocks)
    for level in sorted({part.level for part in (*close, *probe) if part.level is not None}):
        at_once = {part.teacher: part for part in close if part.level == level and part.teacher}
        if at_once:
            found = student.distances(shown_in, level, {name: features[name] for name in at_once})
            for name, part in at_once.items():
                part.write(found[name])
        for part in probe:
            if part.level == level and balls_in:
                part.write(student.contact(balls_in, level))


# What is said and written of it.


def _says(teachers: Sequence[str], readings: Sequence[Reading]) -> list[str]:
    """What was measured, in sentences; which block to align does not follow from it."""
    said = []
    for teacher in teachers:
        errors: dict[int, list[float]] = {}
        straw = {}
        for reading in readings:
            if reading.teacher != teacher or reading.measure != "relation_error":
                continue
            if reading.block is None:
                straw[reading.source] = reading.value
            else:
                errors.setdefault(reading.block, []).append(reading.value)
        mean = {block: float(np.mean(values)) for block, values in errors.items()}
        far, near = max(mean, key=mean.__getitem__), min(mean, key=mean.__getitem__)
        said.append(
            f"Over all noise levels, block {far} is farthest from {teacher} (relation error "
            f"{mean[far]:.3f}) and block {near} nearest ({mean[near]:.3f}); raw pixels are at "
            f"{straw['pixels']:.3f}, the untrained teacher at {straw['untrained']:.3f}."
        )
    contact = [reading for reading in readings if reading.measure == "contact_auc"]
    in_blocks = [reading for reading in contact if reading.source == "block"]
    if in_blocks:
        best = max(in_blocks, key=lambda reading: reading.value)
        others = [
            f"{_name(reading)} {_with_interval(reading)}"
            for reading in contact
            if reading.source != "block"
        ]
        said.append(
            f"Contact is read best from block {best.block} at noise {best.noise:g}, with an AUC of "
            f"{_with_interval(best)}, the highest of {len(in_blocks)} readings; "
            f"{', '.join(others)}; chance is 0.5."
        )
    said.append("Which block gains most from being aligned is not measured by this.")
    return said


def _name(reading: Reading) -> str:
    """Of a source that is not a block."""
    teacher = reading.teacher
    names = {"pixels": f"raw pixels on {teacher}'s grid", "untrained": f"{teacher} untrained"}
    return names.get(reading.source, str(teacher))


def _with_interval(reading: Reading) -> str:
    return f"{reading.value:.3f} [{reading.low:.3f}, {reading.high:.3f}]"


def table(found: Scan) -> str:
    """A plain table for each teacher: a line per block, the noise levels of a measure side by side;
    then the straw men, which see no noise. Intervals are in scan.csv."""
    value = {
        (r.measure, r.teacher, r.source, r.block, r.noise): f"{r.value:.3f}" for r in found.readings
    }
    measures = [m for m in NAMES if any(r.measure == m for r in found.readings)]
    room = max(6 * len(found.noise_levels), *(len(NAMES[m]) for m in measures))
    lines = []
    for teacher in found.teachers:
        lines.append(f"{teacher}:")
        lines.append(_line("", [NAMES[measure] for measure in measures], room))
        levels = "".join(f"{level:<6g}" for level in found.noise_levels)
        lines.append(_line("noise", [levels for _ in measures], room))
        for block in found.blocks:
            cells = []
            for measure in measures:
                of = None if measure == "contact_auc" else teacher
                keys = ((measure, of, "block", block, level) for level in found.noise_levels)
                cells.append("".join(f"{value[key]:<6}" for key in keys))
            lines.append(_line(f"block {block}", cells, room))
        for source, name in (
            ("pixels", "raw pixels"),
            ("untrained", "untrained"),
            ("teacher", "teacher"),
        ):
            cells = [value.get((m, teacher, source, None, None), "") for m in measures]
            if any(cells):
                lines.append(_line(name, cells, room))
        lines.append("")
    return "\n".join([*lines, *found.notes, *found.says])


def _line(name: str, cells: Sequence[str], room: int) -> str:
    return f"{name:<12}{'  '.join(f'{cell:<{room}}' for cell in cells)}".rstrip()


def _write(found: Scan, recipe: Recipe) -> None:
    rows = [asdict(reading) for reading in found.readings]
    content = {
        "teachers": found.teachers,
        "blocks": found.blocks,
        "noise_levels": found.noise_levels,
        "aligned_blocks": sorted(
            {term.block for term in recipe.terms.values() if isinstance(term.block, int)}
        ),
        "readings": rows,
        "notes": found.notes,
        "says": found.says,
        "recipe": recipe.text(),
        "environment": environment(),
    }
    atomic_write(found.out / "scan.json", json.dumps(content, indent=1))
    columns = [field.name for field in fields(Reading)]
    atomic_write(found.out / "scan.csv", csv_text(columns, rows))
    report([], found.out / "report.html", scans=[found.out], title=f"Scan of {recipe.name}")
