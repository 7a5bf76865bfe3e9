"""Files that are either whole or absent, whenever a run is stopped."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

CHUNK_BYTES = 1 << 20
STALE_SECONDS = 3600.0
"""A temporary file that nobody has written to for so long belongs to no living process."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, to be written as one file inside the `with` block.

    When the block ends well the file is synced to disk and takes the place of `path` in one step;
    when it fails or is interrupted the file is removed and `path` stays as it was. The temporary
    name starts with ".tmp-", which is how leftovers of a killed process are recognised, and ends
    with the suffix of `path`, from which writers guess the format. Raises OSError, also when the
    folder does not exist or the block wrote nothing.
    """
    path = Path(path)
    # Not tempfile: its files are readable by their owner alone, and the rename would keep that.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        yield temporary
        with open(temporary, "r+b") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in `folder`, not below it.

    Those of the last hour stay: another process may be writing them now.
    """
    for path in folder.glob(".tmp-*"):
        try:
            if time.time() - path.stat().st_mtime > STALE_SECONDS:
                path.unlink()
        except OSError:
            continue  # Another process has swept it, or it is not ours to remove.


def is_vacant(folder: Path) -> bool:
    """Whether `folder` can be taken: it does not exist, or holds leftovers of killed processes
    alone."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(path.name.startswith(".tmp-") for path in folder.iterdir())


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data`, text as UTF-8 with its newlines as they are, so that a reader of `path` finds
    the old content or the new one, never a part. Raises OSError."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def file_digest(path: str | Path) -> str:
    """The SHA-256 of the file's content, 64 hexadecimal digits, read in parts. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
