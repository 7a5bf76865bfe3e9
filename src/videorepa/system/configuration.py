"""Reads the configuration of a model's folder, and refuses what no model has."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from videorepa.system.files import parse_json, read_text
from videorepa.system.wording import shown

MOST_LAYERS = 1_000

LARGEST = 1_000_000_000
"""The largest whole number. The largest real ones count pixels and tokens, in millions."""


def read_configuration(path: Path) -> dict[str, Any]:
    """Read a config.json or model_index.json.

    A model is laid out by its configuration before its weights are looked at, so that absurd
    numbers would hang or fill the memory.

    Raises:
      OSError: The file cannot be read.
      ValueError: The file is no JSON object, or it has numbers that no model has.
    """
    values = parse_json(read_text(path))
    if not isinstance(values, dict):
        raise ValueError(f"it holds {type(values).__name__}; expected keys and values")
    _check(values)
    return values


def check_numbers(stock_class: type, values: Mapping[str, Any]) -> None:
    """Check that what a stock class takes as a number is none in quotes.

    The classes would keep the text, and fail over it when the model runs.

    Raises:
      ValueError: It is; the message names the key.
    """
    for key, parameter in inspect.signature(stock_class).parameters.items():
        is_number = type(parameter.default) in (int, float)
        if is_number and isinstance(value := values.get(key), str):
            raise ValueError(f"{key} is {shown(value)}, which is text; expected a number")


def _check(values: dict[str, Any]) -> None:
    for key, value in values.items():
        if isinstance(value, dict):
            _check(value)
            continue
        numbers = [n for n in (value if isinstance(value, list) else [value]) if type(n) is int]
        is_count = any(word in key for word in ("layers", "blocks", "depth"))
        if sum(map(abs, numbers)) > (MOST_LAYERS if is_count else LARGEST):
            most = f"{MOST_LAYERS:,} layers" if is_count else f"{LARGEST:,}"
            raise ValueError(f"{shown(key)} is {shown(value)}; no model has more than {most}")
