"""Makes text-to-video diffusion models obey physics better, by aligning them with video encoders.

Every verb of the command line is a function here, loaded when it is first used.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "prepare": "videorepa.prepare",
    "train": "videorepa.train",
    "generate": "videorepa.generate",
    "evaluate": "videorepa.evaluate",
    "export": "videorepa.export",
    "import_weights": "videorepa.import_weights",
    "inspect": "videorepa.inspect",
    "scan": "videorepa.scan",
    "probe": "videorepa.probe",
    "refine": "videorepa.refine",
    "report": "videorepa.report",
    "compare": "videorepa.compare",
    "demo": "videorepa.demo",
    "train_head": "videorepa.head",
    "Recipe": "videorepa.recipe",
    "TokenGrid": "videorepa.tokens",
    "Projector": "videorepa.align",
    "resample": "videorepa.align",
    "tap": "videorepa.align",
    "load_encoder": "videorepa.encoders",
    "UserError": "videorepa.errors",
}

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
    from videorepa.prepare import prepare
    from videorepa.probe import probe
    from videorepa.recipe import Recipe
    from videorepa.refine import refine
    from videorepa.report import report
    from videorepa.scan import scan
    from videorepa.tokens import TokenGrid
    from videorepa.train import train


class _Package(ModuleType):
    """Importing the module `videorepa.train` must not hide the function `videorepa.train`."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)

    def __getattr__(self, name: str) -> Any:
        if name not in _HOMES:
            raise AttributeError(f"module 'videorepa' has no attribute {name!r}")
        return getattr(import_module(_HOMES[name]), name)


sys.modules[__name__].__class__ = _Package
