"""Keeps two processes out of one folder, by a lock that the system releases when one dies."""

from __future__ import annotations

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from videorepa.errors import UserError
from videorepa.system.progress import console

if os.name == "nt":
    import msvcrt
else:
    import fcntl

SUFFIX = ".lock"

_CANNOT_LOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
"""Errors of file systems without locks."""


@contextmanager
def sole_user(folder: Path, lock: str = SUFFIX) -> Iterator[None]:
    """Be the only process that works in `folder`, which is made if need be.

    Args:
      folder: The folder to lock.
      lock: Name of the lock file in it. Others can hold one of another name at the same time.

    Raises:
      UserError: Another process holds the lock, which the message names, or `folder` is a file.
      OSError: The lock file cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"{folder} exists and is not a folder. Choose another.") from None
    with locked(folder / lock, folder):
        yield


@contextmanager
def locked(path: Path, what: Path, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` while working on `what`. It is removed afterwards.

    The file says who holds it. One that a killed process has left is no obstacle, since the lock is
    not the file but the system's, and ends with the process.

    Args:
      path: The lock file.
      what: What is worked on, for the message.
      wait: Wait until another process is done, for work of a moment that is only slower if two do
        it at once where the file system has no locks.

    Raises:
      UserError: Another process holds the lock, which the message names.
      OSError: The lock file cannot be written.
    """
    handle = _acquire(path, what, wait)
    try:
        yield
    finally:
        if os.name == "nt":  # Windows removes no open file.
            os.close(handle)
        with suppress(OSError):
            path.unlink()
        if os.name != "nt":
            os.close(handle)


def lock_beside(path: Path) -> Path:
    """The lock file for work on `path`, beside it."""
    return path.parent / f".{path.name}{SUFFIX}"


def is_lock(path: Path) -> bool:
    """Whether a file is a lock, by its name."""
    return path.name.startswith(".") and path.name.endswith(SUFFIX)


def _acquire(path: Path, what: Path, wait: bool) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _lock(handle, path, what, wait)
            # Its last holder may have removed the file after it was opened here.
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(handle), os.stat(path)):
                    since = time.strftime("%Y-%m-%d %H:%M:%S")
                    holder = f"process {os.getpid()} on {socket.gethostname()} since {since}"
                    os.ftruncate(handle, 0)
                    os.write(handle, holder.encode())
                    return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path, what: Path, wait: bool) -> None:
    try:
        if os.name == "nt":
            # What is locked cannot be read by others, so it is a byte far behind the text.
            os.lseek(handle, 1 << 30, os.SEEK_SET)
            msvcrt.locking(handle, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError as error:
        if error.errno in _CANNOT_LOCK:
            if not wait:
                console.print(
                    f"The file system of {path} has no locks. See to it that no other process "
                    "works there.",
                )
            return
        if error.errno not in (errno.EAGAIN, errno.EACCES):
            raise
        os.lseek(handle, 0, os.SEEK_SET)
        # It is empty for the moment in which its holder has not written yet.
        holder = os.read(handle, 1000).decode(errors="replace") or "another process"
        raise UserError(
            f"{what} is in use by {holder}. Wait until that has ended or end it, then run the same "
            "command again; or choose another folder."
        ) from None
