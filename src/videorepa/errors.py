"""Errors that a user can act on: each says what was found, what was expected and what to do."""

from __future__ import annotations


class UserError(Exception):
    """Something outside the program has to change. The message is shown without a traceback."""


class ClipError(Exception):
    """One clip cannot be used. It is left out, and reported by its id with the reason."""
