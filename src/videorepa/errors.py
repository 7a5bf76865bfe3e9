"""Errors that a user can act on: each says what was found, what was expected and what to do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the program has to change. The message is shown without a traceback."""


class ClipError(Exception):
    """One clip cannot be used. It is left out, and reported by its id with the reason."""


@contextmanager
def as_user_error(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn any error inside the `with` block into a UserError with the message that describes it.

    It is for code of others, which fails in every way over a file of a user's. A UserError passes.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(describe(error)) from None
