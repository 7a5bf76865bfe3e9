"""Measures, before any training, how close each block is to each teacher, and how well either
foretells contact: what there is to choose the block to align by."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch

from videorepa.align.resampling import resample
from videorepa.artifacts.finished import claim_folder, read_finished, write_finished
from videorepa.encoders import EncoderSpec
from videorepa.errors import UserError
from videorepa.probing.blocks import Blocks, encode
from videorepa.probing.clips import Clips, contact_clips, readable_clips
from videorepa.probing.readout import FOLDS
from videorepa.probing.records import Reading
from videorepa.probing.scan_table import sentences
from videorepa.probing.sources import all_teachers, look, straw_men
from videorepa.recipe import Recipe
from videorepa.report import report
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.environment import environment
from videorepa.system.files import atomic_write, csv_text
from videorepa.system.fingerprint import json_digest
from videorepa.tokens import TokenGrid
from videorepa.world.simulator import FRAMES, SIZE

FORMAT = 1
"""Raised whenever the same clips and models would be measured otherwise."""

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

PARTS = "scan-parts"
"""Folder, in a scan's own, of what is finished; by it a scan's folder is known."""


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
    shown, notes = readable_clips(recipe, clips)
    balls = None
    size = (recipe.data.frames, recipe.data.height, recipe.data.width)
    if size != (FRAMES, SIZE, SIZE):
        notes.append(
            f"Contact was not read: the probe's clips are the lab's, of {FRAMES}x{SIZE}x{SIZE}, "
            f"and the recipe's are of {'x'.join(map(str, size))}."
        )
    elif probe_clips:
        balls = contact_clips(recipe, probe_clips)
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)

    parts = _parts(recipe, out / PARTS, known, levels, numbers, shown, balls, dtype)
    claim_folder(out, PARTS, "scan")
    todo = [part for part in parts if part.read() is None]
    _measure(recipe, todo, known, numbers, shown, balls, where, dtype)
    readings = [reading for part in parts for reading in part.read() or ()]
    says = sentences(list(known), readings)
    found = Scan(out, list(known), numbers, levels, readings, notes, says)
    _write(found, recipe)
    return found


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

        return read_finished(self.path, self.made_with, parse)

    def write(self, readings: Sequence[Reading]) -> None:
        write_finished(self.path, self.made_with, [asdict(reading) for reading in readings])


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
    student = Blocks(recipe.backbone.load(("transformer",), where, dtype), blocks)
    for level in sorted({part.level for part in (*close, *probe) if part.level is not None}):
        at_once = {part.teacher: part for part in close if part.level == level and part.teacher}
        if at_once:
            found = student.distances(shown_in, level, {name: features[name] for name in at_once})
            for name, part in at_once.items():
                part.write(found[name])
        for part in probe:
            if part.level == level and balls_in:
                part.write(student.contact(balls_in, level))


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
