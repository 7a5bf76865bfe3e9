"""Extracts the features that a probe reads, and writes them to disk chunk by chunk."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from videorepa.artifacts.finished import read_finished, write_finished
from videorepa.errors import UserError
from videorepa.probing.clips import ShownFrames
from videorepa.probing.physion import Stimulus
from videorepa.probing.sources import Condition, FeatureSource
from videorepa.system.checks import check_finite
from videorepa.system.files import atomic_write, from_metadata, to_metadata
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import track

CHUNK = 16
"""Number of clips whose features are kept in one file."""

MADE_WITH = "made-with.json"

LARGEST = float(np.finfo(np.float16).max)

Chunk = Sequence[Stimulus]


class FeatureStore:
    """A source's features: a folder for each condition, a file for each chunk of clips.

    Args:
        root: Folder of all stores.
        name: The source's name.
        source: Makes the features.
        made_with: What the features depend on. A store made with something else is refused.
    """

    def __init__(
        self, root: Path, name: str, source: FeatureSource, made_with: dict[str, Any]
    ) -> None:
        self.name, self.source, self.made_with = name, source, made_with
        cut = re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        self.path = root / cut
        # Names that are cut alike have folders of their own. Features by an earlier version are
        # in the folder of the cut name, and count if they are of this source.
        if cut != name and not self._is_begun():
            self.path = root / f"{cut}-{json_digest(name)}"

    def open(self) -> None:
        """Make the folder unless it exists. Raises UserError if its features are of another source
        or of other clips."""
        about = self.path / MADE_WITH
        if read_finished(about, self.made_with, lambda _: True) is None:
            if any(self.path.rglob("*.safetensors")):
                raise UserError(
                    f"{self.path} holds features but not what they were made with. Delete it; the "
                    "same command makes them again."
                )
            write_finished(about, self.made_with, None)

    def _is_begun(self) -> bool:
        """Whether the folder holds what this source's features are made with."""
        with suppress(UserError):
            path = self.path / MADE_WITH
            return read_finished(path, self.made_with, lambda _: True) is not None
        return False

    def extract(
        self, chunks: Sequence[Chunk], frames: ShownFrames, device: torch.device, dtype: torch.dtype
    ) -> None:
        """Extract and write missing features. Raises UserError for features that are not finite."""
        todo = [chunk for chunk in chunks if self._missing(chunk)]
        if not todo:
            return
        features_of = self.source.load(device, dtype)
        for chunk in track(todo, self.name, done=len(chunks) - len(todo)):
            clips, failures = frames.read(chunk)
            conditions = self._missing(chunk)
            if clips is None:
                for condition in conditions:
                    self._write(condition, chunk, [], failures, {})
                continue
            for condition, features in features_of(clips, conditions):
                for key, values in features.items():
                    check_finite(f"The features of {self.name}, {key}, {condition},", values)
                self._write(condition, chunk, clips.ids, failures, features)

    def read(
        self, condition: Condition, key: str, chunks: Sequence[Chunk]
    ) -> tuple[list[str], Float[np.ndarray, "n d"]]:
        """Read the features of all readable clips: the clips' ids, and their features in order."""
        ids: list[str] = []
        parts = []
        for chunk in chunks:
            with self._opened(condition, chunk) as file:
                in_chunk = from_metadata(file.metadata())["ids"]
                if in_chunk:
                    parts.append(file.get_tensor(key))
                ids += in_chunk
        if not parts:
            raise UserError("None of Physion's clips can be read.")
        return ids, np.concatenate(parts).astype(np.float32)

    def failures(self, chunks: Sequence[Chunk]) -> dict[str, str]:
        """Why a clip could not be read, by its id."""
        failures: dict[str, str] = {}
        for chunk in chunks:
            with self._opened(self.source.conditions[0], chunk) as file:
                failures |= from_metadata(file.metadata())["failed"]
        return failures

    def _file(self, condition: Condition, chunk: Chunk) -> Path:
        # Named by a digest, since the ids of all its clips would be too long.
        return self.path / str(condition) / f"{json_digest([s.id for s in chunk])}.safetensors"

    def _missing(self, chunk: Chunk) -> list[Condition]:
        return [c for c in self.source.conditions if not self._file(c, chunk).exists()]

    def _write(
        self,
        condition: Condition,
        chunk: Chunk,
        ids: Sequence[str],
        failures: Mapping[str, str],
        features: Mapping[str, Float[np.ndarray, "n d"]],
    ) -> None:
        path = self._file(condition, chunk)
        path.parent.mkdir(exist_ok=True)
        about = {"ids": list(ids), "failed": dict(failures)}
        # In half precision, as v1.5 stores features. Clipped, so that large ones stay finite.
        half = {key: x.clip(-LARGEST, LARGEST).astype(np.float16) for key, x in features.items()}
        atomic_write(path, save(half, metadata=to_metadata(about)))

    def _opened(self, condition: Condition, chunk: Chunk) -> Any:
        path = self._file(condition, chunk)
        try:
            return safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}). Delete it; the same command makes it again."
            ) from None
