"""Finds a backbone, encoder, loss or benchmark by the name of its file, and imports it."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import pkgutil
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from videorepa.errors import UserError
from videorepa.settings.section import Section
from videorepa.system.wording import SHOWN, shown

SEARCH_PATH = "VIDEOREPA_PLUGINS"
"""Environment variable with folders, separated as in PATH, that hold the user's own `losses/`,
`encoders/` and so on. Only the user who runs the program names such a folder, never a recipe."""


def _package(kind: str) -> ModuleType:
    package = importlib.import_module(f"videorepa.{kind}")
    for folder in filter(None, os.environ.get(SEARCH_PATH, "").split(os.pathsep)):
        own = os.path.join(folder, kind)
        if own not in package.__path__:
            package.__path__.append(own)
    return package


def names(kind: str) -> list[str]:
    """List the plugins of a kind: "backbones", "encoders", "losses" or "benchmarks".

    A plugin is one file. Folders, and files with a leading underscore, are what plugins share.
    """
    modules = pkgutil.iter_modules(_package(kind).__path__)
    return sorted(
        module.name for module in modules if not (module.ispkg or module.name.startswith("_"))
    )


def find(kind: str, name: str) -> ModuleType:
    """Import the plugin's module.

    Raises:
      UserError: There is none; the message has the nearest names. Or it is the user's own, and
        importing it fails.
    """
    plugins = names(kind)
    if name not in plugins:
        close = difflib.get_close_matches(name[:SHOWN], plugins, n=3, cutoff=0.4)
        hint = f" Did you mean {' or '.join(close)}?" if close else ""
        singular = {"losses": "loss"}.get(kind, kind[:-1])
        raise UserError(
            f"No {singular} is called {shown(name)}.{hint} Known: {', '.join(plugins)}."
        )
    full = f"videorepa.{kind}.{name}"
    if full in sys.modules:
        return sys.modules[full]
    try:
        return importlib.import_module(full)
    except Exception as error:
        spec = importlib.util.find_spec(full)
        path = str(spec.origin if spec else full)
        if Path(path).is_relative_to(Path(__file__).parents[1]):
            raise
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = f" in line {lines[-1]}" if lines else ""
        raise UserError(
            f"The plugin {path} cannot be imported{line}: {type(error).__name__}: {error}"
        ) from None


def description(kind: str, name: str) -> Any:
    """Give the plugin's description: the class that its module defines for a recipe to hold."""
    module = find(kind, name)
    for value in vars(module).values():
        own = isinstance(value, type) and value.__module__ == module.__name__
        if own and issubclass(value, Section) and "name" in value.model_fields:
            return value
    raise UserError(
        f"{module.__file__} defines no description; expected a class for recipes with `name: "
        f'Literal["{name}"]`.'
    )


def benchmark(name: str, settings: Sequence[str] = ()) -> Any:
    """Make the benchmark of that name, with settings of its own, each `key=value`."""
    return description("benchmarks", name).from_settings(settings, f"the benchmark {name}")
