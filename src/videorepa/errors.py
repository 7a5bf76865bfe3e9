"""Errors that a user can act on: each says what was found, what was expected and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program has to change; shown without a traceback."""


class ClipError(Exception):
    """One clip cannot be used. It costs that clip alone and is reported by its id and reason."""
