"""Imports modules of packages that only some recipes need."""

from __future__ import annotations

import importlib
from typing import Any

from videorepa.errors import UserError


def import_extra(module: str, extra: str, needed_by: str) -> Any:
    """Import a module that `pip install videorepa` alone does not bring.

    Args:
      module: The module's full name.
      extra: The extra of videorepa that brings it.
      needed_by: The setting or the verb that needs it, for the message.

    Raises:
      UserError: The module cannot be imported; the message says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(
            f"{needed_by} needs {module.partition('.')[0]}, which cannot be imported ({error}). "
            f"Install it with `pip install 'videorepa[{extra}]'`."
        ) from None
