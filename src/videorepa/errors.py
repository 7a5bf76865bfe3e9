"""Errors that a user can act on: each says what was found, what was expected and what to do."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager


class UserError(Exception):
    """Something outside the program has to change. The message is shown without a traceback."""


class ClipError(Exception):
    """One clip cannot be used. It is left out, and reported by its id with the reason."""


@contextmanager
def as_user_error(describe: Callable[[Exception], str]) -> Iterator[None]:
    """Turn any error inside the `with` block into a UserError with the message that describes it.

    It is for code of others, which fails in every way over a file of a user's. A UserError passes,
    and so does a lack of memory.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if lacks_memory(error):
            raise
        raise UserError(describe(error)) from None


@contextmanager
def within_memory(remedies: Sequence[str]) -> Iterator[None]:
    """Turn a lack of memory inside the `with` block into a UserError that says what to change.

    Args:
      remedies: Changes that take less memory, the cheapest first.
    """
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        reason = str(error).partition("\n")[0][:200].rstrip(". ") or type(error).__name__
        listing = "; ".join(f"({number}) {remedy}" for number, remedy in enumerate(remedies, 1))
        raise UserError(
            f"There is not enough memory ({reason}). What helps, the cheapest first: {listing}."
        ) from None


def lacks_memory(error: Exception) -> bool:
    """Whether an error says that main memory or a device's is full."""
    # torch is not imported here, since the command line's help would wait for it.
    says = str(error)
    return (
        isinstance(error, MemoryError)
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and any(sign in says for sign in _SIGNS))
    )


_SIGNS = ("can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Parts of what torch says of a lack of memory in errors that have no class of their own."""
