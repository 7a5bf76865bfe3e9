"""Checks the files of every part of a recipe: whole, of the expected class, and as published."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from videorepa.backbones import BackboneSpec
from videorepa.benchmarks._judged import Judged
from videorepa.encoders._vit import ViTSpec
from videorepa.errors import UserError
from videorepa.recipe import Recipe
from videorepa.system.configuration import read_configuration
from videorepa.system.files import parse_json
from videorepa.system.hub import local_copy
from videorepa.system.progress import track
from videorepa.system.weights import Misfit
from videorepa.system.wording import count
from videorepa.verifying.files import ReadWeights, read_weights
from videorepa.verifying.record import Verification, names
from videorepa.verifying.teacher import innermost

SCALE = ("scaling_factor", "latents_mean", "latents_std")

ROTARY = ("rope", "rotary")


def check_weights(record: Verification, recipe: Recipe, judge: Judged | None) -> None:
    """Read every file of weights, and enter what was read into the record."""
    for name, path, expected in track(list(_parts(recipe, judge)), "read"):
        try:
            config = _config(path)
            weights = read_weights(path, config)
            faults = [*weights.faults, *_other_class(config, expected)]
            extra = _misfit(weights, config, expected, faults)
        except (UserError, OSError) as error:
            record.add(f"files of {name}", "fails", str(error))
            continue
        record.weights[name], record.kept[name] = weights, weights.kept()
        for fault in faults:
            record.add(f"files of {name}", "fails", fault)
        if extra:
            record.add(f"files of {name}", "doubtful", f"{extra} is not used")
        if not faults:
            told = len(weights.files) - len(weights.unpublished)
            words = (
                f"{len(weights.tensors)} tensors read whole; the Hub's digest is known of {told}"
            )
            words += f" of {count(len(weights.files), 'file')}" + (", and equal" if told else "")
            record.add(f"files of {name}", "ok", words)
    for part in ("transformer", "vae"):
        _check_published(record, recipe.backbone, part)


def _parts(recipe: Recipe, judge: Judged | None) -> Iterator[tuple[str, Path, str | None]]:
    """The name, path and stock class, if it is known, of each part with weights."""
    spec = recipe.backbone
    folder = spec.folder()
    for part in getattr(spec, "parts", (spec.part,)):
        yield part, folder / part, spec.transformer_class
    yield "vae", folder / "vae", spec.vae_class
    preparing = spec.preparing.folder()
    if preparing != folder:
        yield "vae of prepared_with", preparing / "vae", spec.vae_class
    for part, stock_class in spec.text_encoder_classes().items():
        yield part, preparing / part, stock_class
    encoders = (term.encoder for term in recipe.terms.values() if term.encoder)
    for encoder in dict.fromkeys(innermost(encoder) for encoder in encoders):
        if isinstance(encoder, ViTSpec):
            yield f"teacher {encoder.name}", local_copy(encoder.source), None
    if judge is not None:
        yield "judge", local_copy(judge.judge), None


def _config(path: Path) -> dict[str, Any]:
    file = path / "config.json"
    if not file.exists():
        return {}
    try:
        config = read_configuration(file)
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as a model's configuration: {error}.") from None
    # Where and with which version a folder was written decides nothing.
    own = ("_name_or_path", "_diffusers_version", "transformers_version")
    return {key: value for key, value in config.items() if key not in own}


def _other_class(config: dict[str, Any], expected: str | None) -> list[str]:
    stated = [config["_class_name"]] if "_class_name" in config else config.get("architectures")
    if expected is None or not stated or expected in stated:
        return []
    return [f"its configuration names the class {', '.join(map(str, stated))}, not {expected}"]


def _misfit(
    weights: ReadWeights, config: dict[str, Any], expected: str | None, faults: list[str]
) -> str:
    """Compare shapes with a diffusers class; text encoders are compared when they are loaded.

    Returns:
      Tensors that the class does not have.
    """
    import diffusers

    stock_class: Any = getattr(diffusers, expected or "", None)
    if stock_class is None or faults:
        return ""
    with torch.device("meta"):
        shapes = {
            name: tuple(value.shape)
            for name, value in stock_class.from_config(config).state_dict().items()
        }
        stored = {name: torch.empty(shape) for name, shape in weights.shapes.items()}
    misfit = Misfit.between(stored, shapes)
    if misfit.missing or misfit.misshapen:
        faults.append(f"does not fit {expected}; {misfit}")
        return ""
    return names(misfit.extra) if misfit.extra else ""


def _check_published(record: Verification, spec: BackboneSpec, part: str) -> None:
    """Compare what decides scale and positions with the published model of the folder's name."""
    name = Path(spec.source).name
    published = spec.published.get(name)
    if published is None:
        return
    expected, found = spec.published_config(name, part), spec.config(part)
    keys = {key for key in expected if key in SCALE or any(word in key for word in ROTARY)}
    keys |= published.get(part, {}).keys()
    # Classes' defaults have tuples where a file has lists.
    expected = parse_json(json.dumps({key: expected[key] for key in keys}))
    wrong = [key for key in sorted(keys) if found.get(key) != expected[key]]
    for key in wrong:
        record.add(
            f"configuration of {part}: {key}",
            "fails",
            f"is {found.get(key)}; {name} was published with {expected[key]}",
        )
    if not wrong:
        words = f"{len(keys)} values of scale, positions and size are those of {name}"
        record.add(f"configuration of {part}", "ok", words)
