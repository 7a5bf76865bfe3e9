"""Proves on the user's own weights that the models are whole, and used as their makers use them."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Literal, get_args

from videorepa.align.contract import check
from videorepa.errors import UserError, lacks_memory
from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype, pick_device, release
from videorepa.system.environment import environment
from videorepa.system.hub import quieten_libraries
from videorepa.system.progress import console
from videorepa.training.extras import check_extras
from videorepa.verifying.clip import simulated
from videorepa.verifying.encoding import check_autoencoder, check_text
from videorepa.verifying.exporting import check_export
from videorepa.verifying.judging import compare_judge, named_judge
from videorepa.verifying.pipeline import (
    check_denoising,
    clip_size,
    compare_with_stock,
    drawn_text,
    encoded_image,
    watch,
)
from videorepa.verifying.record import Verification
from videorepa.verifying.step import measure_step
from videorepa.verifying.teacher import compare_teacher, innermost
from videorepa.verifying.weights import check_weights

Subject = Literal[
    "files", "step", "text", "autoencoder", "transformer", "teacher", "judge", "export"
]


def verify(
    recipe: Recipe,
    out: Path,
    *,
    against: Path | None = None,
    judge: str | None = None,
    skip: Collection[Subject] = (),
    device: str | None = None,
) -> Verification:
    """Check the recipe's weights, one part after the other, and write a record of it.

    Files are read whole. What the models make of a small clip from a fixed seed is compared with
    the stock classes, a training step is measured, and an export is reloaded. Every model has left
    the memory before the next one is loaded.

    Args:
      recipe: Names the weights, and how they are trained. Neither its clips nor its cache are read.
      out: The JSON file to write; it is written anew after every part.
      against: An earlier record of the same weights to compare with.
      judge: A benchmark whose judge is checked too, as NAME or NAME=FOLDER.
      skip: Parts to leave out.
      device: Where the models run; by default the first GPU, or the CPU.

    Raises:
      UserError: The recipe cannot work, or `against` is no record or would be replaced. What is
        wrong with weights is in the result.
    """
    if unknown := set(skip) - set(get_args(Subject)):
        raise UserError(
            f"There is no part {', '.join(sorted(unknown))} to skip; expected "
            f"{', '.join(get_args(Subject))}."
        )
    if against is not None and against.resolve() == out.resolve():
        raise UserError(
            f"The record would replace {against}, to be compared with; give another out."
        )
    check(recipe)
    check_extras(recipe)
    quieten_libraries()
    reference = None if against is None else Verification.read(against)
    benchmark = None if judge is None else named_judge(judge)
    where = pick_device(device)
    dtype = compute_dtype(recipe.train.precision, where)
    record = Verification(recipe.name, environment(), str(where), str(dtype).removeprefix("torch."))
    size = clip_size(recipe.backbone)
    frames, caption = simulated(size)
    moments = text = None

    def files() -> None:
        check_weights(record, recipe, benchmark)

    def step() -> None:
        measure_step(record, recipe, where)

    def encode_text() -> None:
        nonlocal text
        text = check_text(record, recipe, caption, where, dtype)

    def encode_video() -> None:
        nonlocal moments
        moments = check_autoencoder(record, recipe, frames, where, dtype)

    def transformer() -> None:
        drawn, image = drawn_text(recipe.backbone, dtype), None
        if recipe.backbone.takes_image:
            image = encoded_image(recipe, frames, where, dtype)
            release(where)
        watched = watch(recipe, frames, size, drawn, where, dtype)
        release(where)
        backbone = recipe.backbone.load(("transformer",), where, dtype)
        compare_with_stock(record, recipe, backbone, watched, size, image)
        if moments is not None and text is not None:
            check_denoising(record, backbone, moments, text, image)

    def teachers() -> None:
        encoders = (term.encoder for term in recipe.terms.values() if term.encoder)
        for spec in dict.fromkeys(innermost(spec) for spec in encoders):
            compare_teacher(record, spec, where, dtype)

    def judged() -> None:
        assert benchmark is not None
        compare_judge(record, benchmark, where, dtype)

    def export() -> None:
        check_export(record, recipe, size, out)

    # The step comes first, since on the CPU only the largest memory so far can be measured.
    work = (files, step, encode_text, encode_video, transformer, teachers, judged, export)
    parts: dict[Subject, Callable[[], None]] = dict(zip(get_args(Subject), work, strict=True))
    for subject, part in parts.items():
        if subject in skip or (subject == "judge" and benchmark is None):
            continue
        console.print(f"{subject} ...")
        told = len(record.checks)
        try:
            part()
        except UserError as error:
            record.add(subject, "fails", str(error))
        except Exception as error:
            if not lacks_memory(error):
                raise
            reason = str(error).partition("\n")[0][:200]
            record.add(subject, "fails", f"there is not enough memory: {reason}")
        release(where)
        record.write(out)
        for each in record.checks[told:]:
            print(each, flush=True)
    if reference is not None:
        told = len(record.checks)
        record.compare_with(reference)
        record.write(out)
        for each in record.checks[told:]:
            print(each, flush=True)
    return record
