"""Finds a model's folder on this machine, or has the Hugging Face Hub bring it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

from videorepa.errors import UserError
from videorepa.system.files import check_is_file, from_home


@cache
def local_copy(source: str, kind: Literal["model", "dataset"] = "model") -> Path:
    """The file or folder itself, or the Hub's snapshot of that id. kind: what the Hub has there.

    Raises UserError, saying what was tried, if neither can be had.
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
        found = snapshot_download(source, repo_type=kind, ignore_patterns=["*.md", "assets/*"])
        return Path(found)
    except Exception as error:
        raise UserError(
            f"{source} is not on this machine and could not be had from the Hub "
            f"({type(error).__name__}). Download it and give its path instead."
        ) from None


def cached_file(source: str, file: str) -> Path | None:
    """A file that the Hub brought of that id before, or None; brings nothing itself."""
    if not _is_hub_id(source):
        return None
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(source, file)
    return Path(found) if isinstance(found, str) else None


def _is_hub_id(source: str) -> bool:
    return not source.startswith((".", "/", "~")) and source.count("/") == 1


@contextmanager
def plain_weights(path: Path) -> Iterator[None]:
    """Around reading a file of weights: whatever is the matter becomes a UserError."""
    try:
        yield
    except Exception as error:
        raise UserError(
            f"{path} cannot be read as plain weights ({type(error).__name__}). It is damaged, "
            "or a pickle that would run code, which is never loaded."
        ) from None


def quieten_libraries() -> None:
    """Keep the libraries' own progress bars and remarks out of ours."""
    import diffusers
    import transformers

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()


def micro_weights(model: str) -> Path:
    """The folder of a shipped micro model, "cogvideox", "videomae" or "dinov2", or the file of its
    teacher's head, "motion.safetensors"."""
    return Path(__file__).parents[1] / "micro" / model
