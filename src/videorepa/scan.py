"""Measures, before any training, how close each block of the base model is to each teacher.

The result helps to choose the block to align.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from videorepa.align.contract import check_rate
from videorepa.align.resampling import resample
from videorepa.artifacts.finished import claim_folder, read_finished, write_finished
from videorepa.data.video import READER
from videorepa.encoders import Encoder, EncoderSpec
from videorepa.errors import UserError, within_memory
from videorepa.probing.blocks import Blocks, encode
from videorepa.probing.clips import Clips, first_readable_clips
from videorepa.probing.closeness import closeness, mean_over_clips, next_clips, own
from videorepa.probing.records import Measurement, Scan
from videorepa.probing.scan_table import sentences
from videorepa.probing.sources import all_teachers, check_blocks, straw_men
from videorepa.recipe import Recipe
from videorepa.remedies import FEWER_CLIPS, in_encoding
from videorepa.report import report
from videorepa.system.device import compute_dtype, pick_device
from videorepa.system.environment import environment
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import track
from videorepa.tokens import TokenGrid

FORMAT = 4
"""Raised whenever the same clips and models would be measured differently."""

NOISE_LEVELS = (0.1, 0.3, 0.5, 0.7, 0.9)

PARTS = "scan-parts"
"""Folder of finished parts. A folder that has it is recognised as a scan's."""


def scan(
    recipe: Recipe,
    out: Path,
    *,
    teachers: Mapping[str, EncoderSpec] | None = None,
    clips: int = 12,
    noise_levels: Sequence[float] = NOISE_LEVELS,
    blocks: Sequence[int] | None = None,
    device: str | None = None,
) -> Scan:
    """Measure how close each block of the recipe's base model is to each teacher, by noise level.

    The base model and the teachers see the first readable clips of the recipe's data, with their
    captions. Relation error, relation correlation and CKA compare their features, and the mean and
    spread of relations are measured on either side (`videorepa.probing.closeness`). Raw pixels and
    the untrained teacher are compared with the teacher too. `probe` measures how well the blocks
    predict contact.

    A base model that has no text mode is shown each clip's first frame, which is then left out on
    both sides of all comparisons.

    The clips need not be prepared. `out` gets scan.json, scan.csv and report.html. A part that is
    finished there, such as a noise level of a teacher, is not measured again.

    Args:
        out: Folder of the scan.
        teachers: Further teachers beside the recipe's encoder, by name.
        clips: How many clips to measure on, 2 or more.
        noise_levels: The noise's share of the noisy latents' variance, 0 to 1; the nearest timestep
            is taken.
        blocks: Numbers of the blocks, counted from 1; by default all.
        device: Where to compute; by default the first GPU, or the CPU.

    Raises:
        UserError: `out` holds something else or a part that was measured differently, a number is
            out of range, there is no teacher, the model is told another rate than the clips show,
            or fewer than two clips can be read.
    """
    specs = all_teachers(recipe, teachers or {})
    if not specs:
        raise UserError(
            f"The recipe {recipe.name} has no encoder, so there is no teacher to compare with. "
            "Give one with --teacher NAME=WEIGHTS."
        )
    check_rate(recipe)
    shapes = recipe.backbone.shapes(recipe.data)
    levels = sorted(set(noise_levels))
    numbers = sorted(set(blocks)) if blocks is not None else list(range(1, shapes.blocks + 1))
    if not levels or not all(0 <= level <= 1 for level in levels):
        raise UserError(f"Noise levels are shares from 0 to 1, one or more; got {levels}.")
    check_blocks(numbers, shapes.blocks)
    if clips < 2:
        raise UserError(f"A scan needs 2 clips or more, to see how they spread; got {clips}.")
    for name, spec in specs.items():
        _check_overlap(name, shapes.grid, spec.shape(recipe.data.frames))
        for straw_man in straw_men(spec).values():
            straw_man.shape(recipe.data.frames)  # Raises before anything is computed.
    shown, digest, notes = first_readable_clips(recipe, clips)
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)

    parts = _parts(recipe, out / PARTS, specs, levels, numbers, digest, dtype)
    claim_folder(out, PARTS, "scan")
    missing = [part for part in parts if part.read() is None]
    with within_memory([*in_encoding(recipe), FEWER_CLIPS]):
        _measure(recipe, missing, specs, numbers, shown, where, dtype)
    measurements = [each for part in parts for each in part.read() or ()]
    measured = Scan(
        teachers=list(specs),
        blocks=numbers,
        noise_levels=levels,
        aligned_blocks=recipe.aligned_blocks,
        measurements=measurements,
        notes=notes,
        says=sentences(list(specs), measurements),
        recipe=recipe.text(),
        environment=environment(),
    )
    measured.write(out)
    report([], out / "report.html", scans=[out], title=f"Scan of {recipe.name}")
    return measured


def _check_overlap(name: str, student: TokenGrid, teacher: TokenGrid) -> None:
    try:
        resample(student, like=teacher)
    except UserError as error:
        raise UserError(
            f"The base model and the teacher {name} cannot be compared. {error}"
        ) from None


@dataclass(frozen=True)
class _ScanPart:
    """The measurements that are kept in one file.

    Attributes:
        level: The noise level of the base model; None for the teacher's straw men.
        made_with: What the measurements depend on.
    """

    path: Path
    teacher: str
    level: float | None
    made_with: dict[str, Any]

    def read(self) -> list[Measurement] | None:
        """Return None if it is yet to be measured. Raises UserError if it is stale or damaged."""
        return read_finished(
            self.path,
            self.made_with,
            lambda rows: [replace(Measurement(**row), teacher=self.teacher) for row in rows],
        )

    def write(self, measurements: Sequence[Measurement]) -> None:
        write_finished(self.path, self.made_with, [asdict(each) for each in measurements])


def _parts(
    recipe: Recipe,
    folder: Path,
    teachers: Mapping[str, EncoderSpec],
    levels: Sequence[float],
    blocks: Sequence[int],
    clips_digest: str,
    dtype: torch.dtype,
) -> list[_ScanPart]:
    data, backbone = recipe.data, recipe.backbone
    always = {
        "format": FORMAT,
        "size": [data.frames, data.height, data.width],
        "fps": data.fps,
        "precision": str(dtype),
        "clips": clips_digest,
        "reader": READER,
    } | ({"without": "first frame"} if backbone.takes_image else {})
    student = {
        "backbone": {"name": backbone.name} | backbone.identity(),
        "blocks": list(blocks),
        "seed": recipe.seed,
    }
    parts = []
    for name, spec in teachers.items():
        teacher = {"teacher": {"name": spec.name} | spec.fingerprint()}
        # The digest gives another teacher of the same kind files of its own.
        stem = f"{spec.name}-{json_digest(teacher)}"
        made_with = always | teacher
        parts.append(_ScanPart(folder / f"{stem}-straw-men.json", name, None, made_with))
        for level in levels:
            path = folder / f"{stem}-noise-{level:g}.json"
            made_with = always | student | teacher | {"noise": level}
            parts.append(_ScanPart(path, name, level, made_with))
    return parts


def _measure(
    recipe: Recipe,
    missing: Sequence[_ScanPart],
    teachers: Mapping[str, EncoderSpec],
    blocks: Sequence[int],
    clips: Clips,
    where: torch.device,
    dtype: torch.dtype,
) -> None:
    """Measure the missing parts, one model in memory at once, and write each when it is done."""
    takes_image = recipe.backbone.takes_image

    def compared(spec: EncoderSpec, name: str) -> TokenGrid:
        features = _features(spec.load(where, dtype), clips, name)
        return features.since(1) if takes_image else features

    features = {
        name: compared(teachers[name], name)
        for name in dict.fromkeys(part.teacher for part in missing)
    }
    for part in missing:
        if part.level is None:
            of_teacher = features[part.teacher]
            others = next_clips(of_teacher, slice(None))
            measured = {"teacher": own(of_teacher, others)}
            for source, spec in straw_men(teachers[part.teacher]).items():
                measured[source] = closeness(compared(spec, source), of_teacher, others)
            part.write(
                [
                    mean_over_clips(measure, values, part.teacher, source)
                    for source, of in measured.items()
                    for measure, values in of.items()
                ]
            )
    levels = sorted({part.level for part in missing if part.level is not None})
    if not levels:
        return
    backbone = recipe.backbone.load(("vae", "text_encoder", "image_encoder"), where, dtype)
    encoded = encode(backbone, clips, recipe.seed)
    del backbone
    student = Blocks(recipe.backbone.load(("transformer",), where, dtype), blocks)
    for level in levels:
        at_level = {part.teacher: part for part in missing if part.level == level}
        measurements = student.distances(
            encoded, level, {name: features[name] for name in at_level}
        )
        for name, part in at_level.items():
            part.write(measurements[name])


def _features(encoder: Encoder, clips: Clips, name: str) -> TokenGrid:
    """Compute the encoder's grid of all clips, in float32 on the CPU."""
    grids = [encoder(clips.video(which)) for which in track(clips.batches(), name)]
    return grids[0].with_tokens(torch.cat([grid.tokens.float().cpu() for grid in grids]))
