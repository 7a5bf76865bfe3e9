"""Fingerprints: short texts that change with the content they stand for."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from videorepa.errors import UserError
from videorepa.system.files import open_file, until_changed

WINDOWS = 16

WINDOW_BYTES = 1 << 16


def json_digest(value: Any) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of a value, as JSON."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def weights_digest(path: Path) -> str:
    """A digest, 16 hexadecimal digits, of a file of weights or of the files in a folder.

    A folder's JSON configuration does not count; the caller adds its relevant keys. Files are
    sampled, and not read whole. Weights of different models differ nearly everywhere, so this tells
    models apart, though it may miss a single flipped bit. A process samples a file once, and again
    when it is written to. Raises UserError if there are no weights.
    """
    if path.is_file():
        files = [path]
    else:
        files = sorted(p for p in path.rglob("*") if p.is_file() and not _is_config(p))
    if not files:
        raise UserError(f"There are no weights at {path}.")
    digests = {file.name: _once(file) for file in files}
    return json_digest(digests if path.is_dir() else list(digests.values()))


def file_sample_digest(path: Path) -> str:
    """A digest, 16 hexadecimal digits, of a file's size and of 16 windows spread over it.

    Raises OSError.
    """
    with open_file(path) as stream:
        size = os.fstat(stream.fileno()).st_size
        digest = hashlib.sha256(str(size).encode())
        for window in range(WINDOWS):
            stream.seek(window * max(0, size - WINDOW_BYTES) // (WINDOWS - 1))
            digest.update(stream.read(WINDOW_BYTES))
    return digest.hexdigest()[:16]


_once = until_changed(file_sample_digest)


def _is_config(path: Path) -> bool:
    return path.suffix in (".json", ".md") and path.name != "tokenizer.json"
