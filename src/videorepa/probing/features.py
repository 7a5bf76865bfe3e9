"""Extracts the features that a probe reads, and keeps them on disk as they come."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
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
from videorepa.probing.records import check_finite
from videorepa.probing.sources import Condition, Source
from videorepa.system.files import atomic_write
from videorepa.system.fingerprint import json_digest
from videorepa.system.progress import track

CHUNK = 16
"""Clips whose features are kept in one file."""

LARGEST = float(np.finfo(np.float16).max)


class FeatureStore:
    """A source's features: a folder for each condition, a file for each chunk of clips."""

    def __init__(self, root: Path, name: str, source: Source, made_with: dict[str, Any]) -> None:
        self.path = root / re.sub(r"[^A-Za-z0-9._-]+", "-", name)
        self.source, self.made_with = source, made_with

    def open(self) -> None:
        """Raises UserError if it is another source's, or of other clips."""
        about = self.path / "made-with.json"
        if read_finished(about, self.made_with, lambda _: True) is None:
            if any(self.path.rglob("*.safetensors")):
                raise UserError(
                    f"{self.path} holds features but not what they were made with. Delete it; the "
                    "same command makes them again."
                )
            write_finished(about, self.made_with, None)

    def file(self, condition: Condition, chunk: Sequence[Stimulus]) -> Path:
        # Named by the clips in it, as digests are short.
        return self.path / str(condition) / f"{json_digest([s.id for s in chunk])}.safetensors"

    def missing(self, chunk: Sequence[Stimulus]) -> list[Condition]:
        return [c for c in self.source.conditions if not self.file(c, chunk).exists()]

    def write(
        self,
        condition: Condition,
        chunk: Sequence[Stimulus],
        ids: Sequence[str],
        failed: Mapping[str, str],
        features: Mapping[str, Float[np.ndarray, "n d"]],
    ) -> None:
        path = self.file(condition, chunk)
        path.parent.mkdir(exist_ok=True)
        about = json.dumps({"ids": list(ids), "failed": dict(failed)})
        # As v1.5 does; what does not fit becomes the largest that does.
        half = {
            key: values.clip(-LARGEST, LARGEST).astype(np.float16)
            for key, values in features.items()
        }
        atomic_write(path, save(half, metadata={"about": about}))

    def read(
        self, condition: Condition, key: str, chunks: Sequence[Sequence[Stimulus]]
    ) -> tuple[list[str], Float[np.ndarray, "n d"]]:
        """Ids, and features in their order."""
        ids: list[str] = []
        parts = []
        for chunk in chunks:
            with self._opened(condition, chunk) as file:
                there = _about(file)["ids"]
                if there:
                    parts.append(file.get_tensor(key))
                ids += there
        if not parts:
            raise UserError("None of Physion's clips can be read.")
        return ids, np.concatenate(parts).astype(np.float32)

    def failures(self, chunks: Sequence[Sequence[Stimulus]]) -> list[str]:
        notes = []
        for chunk in chunks:
            with self._opened(self.source.conditions[0], chunk) as file:
                failed = _about(file)["failed"]
            notes += [f"The clip {name} was left out: {why}." for name, why in failed.items()]
        return notes

    def _opened(self, condition: Condition, chunk: Sequence[Stimulus]) -> Any:
        path = self.file(condition, chunk)
        try:
            return safe_open(path, framework="np")
        except (OSError, SafetensorError) as error:
            raise UserError(
                f"{path} is damaged ({error}). Delete it; the same command makes it again."
            ) from None


def _about(file: Any) -> dict[str, Any]:
    return json.loads(file.metadata()["about"])


def extract(
    name: str,
    store: FeatureStore,
    chunks: Sequence[Sequence[Stimulus]],
    cut: ShownFrames,
    where: torch.device,
    dtype: torch.dtype,
) -> None:
    todo = [chunk for chunk in chunks if store.missing(chunk)]
    if not todo:
        return
    live = store.source.load(where, dtype)
    for chunk in track(todo, name, done=len(chunks) - len(todo)):
        clips, ids, failed = cut.read(chunk)
        conditions = store.missing(chunk)
        if clips is None:
            for condition in conditions:
                store.write(condition, chunk, [], failed, {})
            continue
        for condition, features in live.see(clips, ids, conditions, cut):
            for key, values in features.items():
                check_finite(values, f"{name}, {key}, {condition}")
            store.write(condition, chunk, ids, failed, features)
