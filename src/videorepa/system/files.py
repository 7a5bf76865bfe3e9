"""Writes files that are either complete or absent, whenever a run is stopped."""

from __future__ import annotations

import csv
import errno
import hashlib
import io
import json
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, wraps
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from safetensors import SafetensorError

from videorepa.errors import UserError
from videorepa.system.lock import is_lock, lock_beside, locked

Place = TypeVar("Place", str, Path)

R = TypeVar("R")

TEMPORARY = re.compile(r"\.tmp-[0-9a-f]{16}(\.\w+)?")
"""Names of temporary files, none of which a user would choose."""

STALE_SECONDS = 3600.0
"""A temporary file that has not been written to for so long belongs to no living process."""


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, to be written as one file inside the `with` block.

    When the block succeeds, the file is synced to disk and replaces `path` in one step. When it
    fails or is interrupted, the file is removed and `path` stays as it was. The temporary name is
    one of `TEMPORARY`, by which the next process that writes to the folder recognises and removes
    what a killed one has left. It ends with the suffix of `path`, from which writers guess the
    format.

    Raises:
      OSError: The disk refuses, the folder does not exist, or the block wrote nothing. It names
        `path`.
    """
    path = Path(path)
    _sweep(path.parent)
    # tempfile would make the file readable by its owner alone, and the rename would keep that.
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}{path.suffix}")
    try:
        with _naming(path, temporary):
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Give a temporary folder beside `path`, to be filled inside the `with` block.

    When the block succeeds, its files are synced to disk and the folder becomes `path`. When it
    fails or is interrupted, the folder is removed.

    Raises:
      UserError: `path` exists, or another process is writing it.
      OSError: The disk refuses. It names `path`.
    """
    with scratch_folder(path) as temporary:
        if path.exists():
            raise UserError(f"{path} exists already. Choose another folder, or delete it.")
        with _naming(path, temporary):
            yield temporary
            for file in temporary.rglob("*"):
                if file.is_file():
                    sync(file)
            os.replace(temporary, path)


@contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """Give an empty folder beside `path` that is removed when the `with` block ends.

    Its name starts with ".tmp-" and is the same every time, so that the next process removes what a
    killed one has left; a lock beside it keeps living ones apart.

    Raises:
      UserError: Another process has it.
      OSError: The disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".tmp-{path.name}"  # with_name raises for "." and "/".
    with locked(lock_beside(path), path):
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def _naming(path: Path, temporary: Path) -> Iterator[None]:
    """Let errors of writing `temporary` name `path`, which the user knows, and be OSErrors."""
    try:
        yield
    except SafetensorError as error:
        number = refused_by_system(error)
        if number is None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from None
    except OSError as error:
        if error.filename is None or str(error.filename).startswith(str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise


def refused_by_system(error: Exception) -> int | None:
    """The number of the system's error that a writer reports, or None if it reports another."""
    if isinstance(error, OSError):
        return error.errno
    # safetensors ends its message with "(os error 28)". torch has no such number, but says that
    # the file has not become as long as what was written to it.
    match = re.search(r"os error (\d+)", str(error))
    if match is None and "inline_container" in str(error):
        return errno.ENOSPC
    return int(match[1]) if match else None


def sync(path: Path) -> None:
    """Wait until the disk holds a file's content, or a folder's list of files. Raises OSError."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders, and syncs a file only through a handle that can write.
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@cache
def _sweep(folder: Path) -> None:
    """Remove the temporary files that killed processes have left in `folder`, but not below it.

    Those of the last hour stay, because another process may be writing them. Each process looks
    once into a folder, since some hold hundreds of thousands of files.
    """
    for path in folder.glob(".tmp-*"):
        try:
            age = time.time() - path.stat().st_mtime
            if TEMPORARY.fullmatch(path.name) and age > STALE_SECONDS:
                path.unlink()
        except OSError:
            continue  # Another process has removed it, or this one may not.


def until_changed(function: Callable[[Path], R]) -> Callable[[Path], R]:
    """Let a function of a file's content remember its results, each until that file changes.

    The function raises OSError if there is no file.
    """

    @cache
    def remembered(path: Path, *stamp: int) -> R:
        return function(path)

    @wraps(function)
    def current(path: Path) -> R:
        file = path.stat()
        # Copying a file can keep the time of its last change, but not that of its last move.
        return remembered(path.absolute(), file.st_size, file.st_mtime_ns, file.st_ctime_ns)

    return current


def is_vacant(folder: Path) -> bool:
    """Whether `folder` does not exist, or holds only locks and what killed processes have left."""
    if not folder.exists():
        return True
    return folder.is_dir() and all(
        path.name.startswith(".tmp-") or is_lock(path) for path in folder.iterdir()
    )


def atomic_write(path: str | Path, data: bytes | str) -> None:
    """Write `data` so that a reader of `path` gets the old content or the new one, never a part.

    Text is written as UTF-8, with its newlines unchanged. Raises OSError.
    """
    with atomic_path(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file a second name, as a hard link where the file system allows, else as a copy."""
    if target.exists() and target.samefile(source):
        return  # To rename one name of a file to another does nothing, and would leave the first.
    with atomic_path(target) as temporary:
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)


def from_home(path: Place) -> Place:
    """Put the home folder in place of a leading `~` or `~user`, as a shell does."""
    return type(path)(os.path.expanduser(path))


def check_is_file(path: Path) -> None:
    """Raise OSError, with the reason, unless `path` is a file, reached through links or not.

    Asked before a path that a user named is opened: a pipe, a socket or a device can keep its
    reader waiting for ever.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        folder = "" if path.parent.exists() else f", nor does the folder {path.parent}"
        raise FileNotFoundError(errno.ENOENT, "does not exist" + folder, str(path)) from None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "is a folder, not a file", str(path))
    if not stat.S_ISREG(mode):
        reason = "is a pipe, a socket or a device, not a file"
        raise OSError(errno.EINVAL, reason, str(path))


def check_is_folder(path: Path, expected: str) -> None:
    """Raise UserError unless `path` is a folder.

    Args:
      expected: What should be there, for the message.
    """
    if not path.is_dir():
        found = "is not a folder" if path.exists() else "does not exist"
        raise UserError(f"{path} {found}; expected {expected}")


def open_file(path: Path) -> BinaryIO:
    """Open a file that a user named, to read its bytes. Raises OSError."""
    check_is_file(path)
    return path.open("rb")


def read_bytes(path: Path) -> bytes:
    """Read a file that a user named. Raises OSError."""
    check_is_file(path)
    return path.read_bytes()


def read_text(path: Path) -> str:
    """Read a text in UTF-8 that a user named. Raises OSError and UnicodeDecodeError."""
    check_is_file(path)
    return path.read_text(encoding="utf-8")


def short_name(path: Path) -> str:
    """The name of a folder in tables, or that of a file, without its ending."""
    return path.resolve().stem if path.is_file() else path.resolve().name


def to_metadata(about: Mapping[str, object]) -> dict[str, str]:
    """Make the metadata of a safetensors file: one entry "about", in JSON."""
    # safetensors writes several entries in no fixed order, and equal content should make equal
    # files. Hence one entry, with sorted keys.
    return {"about": json.dumps(about, sort_keys=True)}


def from_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """Read what `to_metadata` made. Raises KeyError or ValueError if there is no such entry."""
    return parse_json((metadata or {})["about"])


def parse_json(text: str | bytes) -> Any:
    """Parse JSON. Raises ValueError for anything else, also for what is nested too deep."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deep") from None


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, object]]) -> str:
    """Write a CSV file's text: a header and a line for each row, with None left empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def file_digest(path: str | Path) -> str:
    """The SHA-256 of a file's content, 64 hexadecimal digits. Raises OSError."""
    check_is_file(Path(path))
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
