"""Finds a model's folder on this machine, or downloads it from the Hugging Face Hub."""

from __future__ import annotations

import os
import re
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Literal

from videorepa.errors import UserError, as_user_error
from videorepa.system.files import check_is_file, from_home


@cache
def local_copy(source: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """Give the path itself if it exists, or else the Hub's snapshot, downloaded if necessary.

    Args:
      source: A file, a folder or a Hub id.
      kind: Kind of the Hub's repository.

    Raises:
      UserError: Neither exists; the message says what was tried.
    """
    path = from_home(Path(source))
    if path.is_dir():
        return path
    if path.exists():
        check_is_file(path)
        return path
    if not _is_hub_id(source):
        raise UserError(f"There is nothing at {source}; expected a file, a folder or a Hub id.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, repo_type=kind, ignore_patterns=["*.md", "assets/*"]))
    except Exception as error:
        raise UserError(
            f"{source} is not on this machine and could not be downloaded from the Hub "
            f"({type(error).__name__}). Download it and give its path instead."
        ) from None


def cached_file(source: str, file: str) -> Path | None:
    """Give a file of a Hub id that was downloaded before, or None. Downloads nothing."""
    if not _is_hub_id(source):
        return None
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(source, file)
    return Path(path) if isinstance(path, str) else None


def published_digest(path: Path) -> str | None:
    """Give the SHA-256 with which the Hub published a large file that was downloaded from it.

    The Hub's cache names such files by it, and a download to a folder leaves a note beside them.
    None is returned for files that came in another way.
    """
    is_digest = re.compile(r"[0-9a-f]{64}").fullmatch
    stored = path.resolve()
    if stored.parent.name == "blobs" and is_digest(stored.name):
        return stored.name
    for folder in path.absolute().parents:
        inside = path.absolute().relative_to(folder)
        note = folder / ".cache" / "huggingface" / "download" / f"{inside}.metadata"
        try:
            lines = note.read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError):
            continue
        # The commit, the digest, and when it was downloaded.
        if len(lines) > 1 and is_digest(lines[1]):
            return lines[1]
    return None


def _is_hub_id(source: str) -> bool:
    return not source.startswith((".", "/", "~")) and source.count("/") == 1


def plain_weights(path: Path) -> AbstractContextManager[None]:
    """Turn every error inside the `with` block, which reads a file of weights, into a UserError."""
    return as_user_error(
        lambda error: (
            f"{path} cannot be read as plain weights ({type(error).__name__}). It is damaged, or "
            "a pickle that would run code, which is never loaded."
        )
    )


def stock_loading(what: str, expected: str) -> AbstractContextManager[None]:
    """Turn every error inside the `with` block, where stock classes load, into a UserError.

    Args:
      what: The model and its place.
      expected: A sentence that says what should be there, or what to do.
    """
    quieten_libraries()
    return as_user_error(
        lambda error: (
            f"{what} could not be loaded: {type(error).__name__}: {str(error)[:500]}. {expected}"
        )
    )


def quieten_libraries() -> None:
    """Turn off the progress bars and remarks of diffusers and transformers."""
    import diffusers
    import transformers

    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def user_cache() -> Path:
    """The folder for what the package makes once out of what it ships."""
    return from_home(Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache")) / "videorepa"


def micro_weights(model: str) -> Path:
    """The path of a shipped micro model.

    Args:
      model: The folder "cogvideox", "videomae" or "dinov2", the head's file "motion.safetensors",
        or the LoRA "cogvideox-i2v.safetensors".
    """
    return Path(__file__).parents[1] / "micro" / model
