"""Asks the model in training which of two clips it finds likelier, the real or the broken one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from videorepa.artifacts.scores import Row
from videorepa.backbones import moved
from videorepa.errors import UserError
from videorepa.evaluation.likelihood import (
    Denoising,
    EncodedPairs,
    encode_pairs,
    preference,
    rows_of,
)
from videorepa.evaluation.paired_clips import groups, read_group, read_pairs
from videorepa.recipe import Recipe
from videorepa.system.device import autocast, compute_dtype
from videorepa.system.wording import count
from videorepa.training.parallel import Alone
from videorepa.training.student import Student


def encoded_pairs(recipe: Recipe, workers: Alone) -> list[EncodedPairs]:
    """Encode the recipe's validation pairs, if any, into main memory.

    Call it before the student is loaded, so that the device holds one of them at a time.

    Raises:
      UserError: A pair cannot be used.
    """
    if recipe.validation is None or recipe.validation.pairs is None:
        return []
    found = read_pairs(recipe.validation.pairs)
    failures = found.failures
    shows_first = recipe.backbone.takes_image
    read = [
        (of, read_group(of, recipe.data, failures, shows_first)[1]) for of in groups(found.pairs)
    ]
    if failures:
        name, reason = next(iter(failures.items()))
        raise UserError(
            f"{count(len(failures), 'pair')} of validation.pairs, {recipe.validation.pairs}, "
            f"cannot be used; the first is {name!r}: {reason}. Mend the list or take them out."
        )
    dtype = compute_dtype(recipe.train.precision, workers.device)
    parts = ("vae", "text_encoder", "image_encoder")
    coder = recipe.backbone.load(parts, workers.device, dtype)
    return encode_pairs(coder, read, recipe.data.prepare_batch)


def plausibility(
    recipe: Recipe, student: Student, workers: Alone, encoded: Sequence[EncodedPairs]
) -> Callable[[], dict[str, float]]:
    """Ask the base model, so that the trained one can be compared with it pair by pair.

    Args:
      recipe: Its seed draws the noise, which is the same at every step.
      student: Still the base model.
      workers: All processes ask about all pairs, since a sharded model needs them all.
      encoded: What `encoded_pairs` gives.

    Returns:
      A function that gives, for the log, `likelier`: the percentage of pairs in which the real clip
      has the smaller loss, with its 95 % interval `likelier_low` and `likelier_high`; `log_ratio`,
      the mean of ln(loss of the broken clip / loss of the real one); `log_ratio_gain`, its mean
      difference from the base model over the same pairs; and `likelier_failed`, the number of
      pairs whose losses are not finite. It is empty without pairs.
    """
    if not encoded:
        return dict
    ask = Denoising(student.backbone, seed=recipe.seed, batch=recipe.optim.batch_size)
    device = workers.device

    def rows() -> dict[str, Row]:
        found: dict[str, Row] = {}
        student.transformer.eval()
        with workers.sampling(student), autocast(device, student.dtype):
            for each in encoded:
                text = moved(each.text, device)
                opening = each.opening and each.opening.mapped(lambda x: x.to(device))
                latents = each.latents.to(device)
                for pair, row in rows_of(ask, latents, text, each.pairs, {}, opening):
                    found[pair.id] = row | {"asked": pair.group}
        student.transformer.train()
        return found

    base = rows()
    asked = sum(len(each.pairs) for each in encoded)

    def measure() -> dict[str, float]:
        now = rows()
        logged = {"likelier_failed": float(asked - len(now))}
        share = preference(list(now.values()), "likelier")
        if share["percent"] is not None:
            logged |= {"likelier": share["percent"]}
            logged |= {f"likelier_{end}": share[end] for end in ("low", "high")}
        if both := now.keys() & base.keys():
            gains = [now[pair]["log_ratio"] - base[pair]["log_ratio"] for pair in sorted(both)]
            logged["log_ratio"] = float(np.mean([row["log_ratio"] for row in now.values()]))
            logged["log_ratio_gain"] = float(np.mean(gains))
        return logged

    return measure
