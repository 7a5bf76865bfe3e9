"""Aligns text-to-video models with video encoders, with the aim that they obey physics better.

Every verb of the command line but `lab` is a function here, which is loaded when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_VERBS = (
    *("prepare", "train", "generate", "evaluate", "export", "import_weights", "inspect"),
    *("scan", "probe", "likelihood", "select", "refine", "report", "compare", "verify", "demo"),
)

_HOMES = {verb: verb for verb in _VERBS} | {
    "train_head": "head",
    "Recipe": "recipe",
    "TokenGrid": "tokens",
    "Projector": "align",
    "resample": "align",
    "tap": "align",
    "load_encoder": "encoders",
    "UserError": "errors",
}
"""The module of each public name."""

if TYPE_CHECKING:
    from videorepa.align import Projector, resample, tap
    from videorepa.compare import compare
    from videorepa.demo import demo
    from videorepa.encoders import load_encoder
    from videorepa.errors import UserError
    from videorepa.evaluate import evaluate
    from videorepa.export import export
    from videorepa.generate import generate
    from videorepa.head import train_head
    from videorepa.import_weights import import_weights
    from videorepa.inspect import inspect
    from videorepa.likelihood import likelihood
    from videorepa.prepare import prepare
    from videorepa.probe import probe
    from videorepa.recipe import Recipe
    from videorepa.refine import refine
    from videorepa.report import report
    from videorepa.scan import scan
    from videorepa.select import select
    from videorepa.tokens import TokenGrid
    from videorepa.train import train
    from videorepa.verify import verify


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'videorepa' has no attribute {name!r}")
    return getattr(import_module(f"videorepa.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


class _Package(ModuleType):
    """Keeps `videorepa.train` the function.

    A verb is named like its module, which Python sets as an attribute of the package when anything
    imports it. The attribute would hide `__getattr__`, and only `__setattr__` can refuse it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _VERBS and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
