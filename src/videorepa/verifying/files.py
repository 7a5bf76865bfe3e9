"""Reads files of weights whole, and tells whether each is what was published."""

from __future__ import annotations

import hashlib
import json
import math
import operator
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from videorepa.errors import UserError
from videorepa.system.files import file_digest, open_file, parse_json, read_text
from videorepa.system.hub import plain_weights, published_digest

CHUNK = 1 << 25
"""Bytes in memory at a time."""

LONGEST_HEADER = 100_000_000
"""Bytes; safetensors itself allows no more."""

DIGITS = 4
"""Hexadecimal digits that a record keeps of each tensor's digest. They tell which tensors differ,
where the whole digest says that some do."""

FLOATS = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
"""The dtypes of safetensors whose values can be other than finite."""


@dataclass
class ReadWeights:
    """The files of one part of a model, read whole.

    Attributes:
      source: The folder or file.
      files: The SHA-256 of each file, by its name.
      config: The part's configuration.
      tensors: The digest of each tensor, by its name; it does not depend on how files divide them.
      shapes: The shape of each tensor.
      faults: What is wrong with the files.
      unpublished: Files whose published digest is not known here.
    """

    source: str
    config: dict[str, Any]
    files: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    unpublished: list[str] = field(default_factory=list)

    def kept(self) -> Kept:
        """What a record keeps of it."""
        ordered = sorted(self.tensors.items())
        digest = hashlib.sha256(json.dumps(ordered).encode()).hexdigest()
        names = hashlib.sha256(json.dumps([name for name, _ in ordered]).encode()).hexdigest()
        short = "".join(value[:DIGITS] for _, value in ordered)
        return Kept(self.source, self.files, digest[:16], names[:16], short, self.config)


@dataclass(frozen=True)
class Kept:
    """What a record keeps of a part's weights, small enough to be pasted into a message.

    Attributes:
      source: The folder or file.
      files: The SHA-256 of each file, by its name.
      digest: A digest of all tensors.
      names: A digest of the tensors' names.
      tensors: The first `DIGITS` digits of each tensor's digest, in the order of the names.
      config: The part's configuration.
    """

    source: str
    files: dict[str, str]
    digest: str
    names: str
    tensors: str
    config: dict[str, Any]

    def others(self, weights: ReadWeights) -> list[str] | None:
        """Names of the tensors that differ in `weights`; None if those have other names."""
        own = weights.kept()
        if own.names != self.names:
            return None
        if own.digest == self.digest:
            return []
        kept = [self.tensors[n : n + DIGITS] for n in range(0, len(self.tensors), DIGITS)]
        named = zip(sorted(weights.tensors), kept, strict=True)
        differing = [name for name, short in named if weights.tensors[name][:DIGITS] != short]
        return differing or ["one whose digest begins alike"]


def read_weights(folder: Path, config: dict[str, Any]) -> ReadWeights:
    """Read a folder's weights, or one file of weights, to the last byte.

    Raises:
      UserError: There are no weights, or a file is no file of weights.
      OSError: A file cannot be read.
    """
    weights = ReadWeights(str(folder), config)
    files = [folder] if folder.is_file() else _files(folder, weights)
    for path in files:
        if path.suffix == ".safetensors":
            _read_safetensors(path, weights)
        else:
            _read_pickle(path, weights)
        published, found = published_digest(path), weights.files[path.name]
        if published is None:
            weights.unpublished.append(path.name)
        elif published != found:
            weights.faults.append(
                f"{path.name} has the SHA-256 {found[:12]}..., and was published with "
                f"{published[:12]}...: download it again"
            )
    return weights


def _files(folder: Path, weights: ReadWeights) -> list[Path]:
    """The weights that a stock class loads from a folder; what an index misses becomes a fault."""
    for index in sorted(folder.glob("*.safetensors.index.json")):
        if index.name.count(".") > 3:
            continue  # A variant, such as fp16, which is not loaded.
        try:
            listing = parse_json(read_text(index))["weight_map"]
            files = [folder / name for name in sorted(set(listing.values()))]
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{index} is no list of weights ({type(error).__name__}: {error}); expected "
                "weight_map with the file of each tensor. Download it again."
            ) from None
        present = [path for path in files if path.exists()]
        absent = [path.name for path in files if path not in present]
        weights.faults += [f"{name} is missing, which {index.name} lists" for name in absent]
        return present
    for name in ("diffusion_pytorch_model.safetensors", "model.safetensors"):
        if (folder / name).exists():
            return [folder / name]
    files = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    if not files:
        raise UserError(f"{folder} holds no weights.")
    return files


@dataclass(frozen=True)
class _Described:
    """What a header says of a tensor; the bytes from `begin` to `end` are its values."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @classmethod
    def read(cls, name: str, about: Any) -> _Described:
        """Raises ValueError, KeyError or TypeError if it cannot be."""
        shape = tuple(map(operator.index, about["shape"]))
        begin, end = map(operator.index, about["data_offsets"])
        dtype = FLOATS.get(about["dtype"])
        if end < begin or (dtype and end - begin != math.prod(shape) * dtype.itemsize):
            raise ValueError(f"{name} has other bytes than its shape takes")
        return cls(name, about["dtype"], shape, begin, end)


def _read_safetensors(path: Path, weights: ReadWeights) -> None:
    whole = hashlib.sha256()
    with open_file(path) as stream:
        size = path.stat().st_size
        start = stream.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or not 0 < length <= min(LONGEST_HEADER, size):
            raise UserError(f"{path} is no safetensors file, or not a whole one.")
        text = stream.read(length)
        whole.update(start + text)
        try:
            header = parse_json(text)
            header.pop("__metadata__", None)
            tensors = sorted(
                (_Described.read(name, about) for name, about in header.items()),
                key=lambda tensor: (tensor.begin, tensor.end),
            )
            place = 0
            for tensor in tensors:
                if tensor.begin != place:
                    raise ValueError(f"{tensor.name} does not begin where the one before ends")
                place = tensor.end
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{path} has a damaged header: {type(error).__name__}: {error}. Download it again."
            ) from None
        if 8 + length + place != size:
            weights.faults.append(
                f"{path.name} has {size:,} bytes, and its header describes {8 + length + place:,}: "
                "download it again"
            )
        for tensor in tensors:
            digest = _tensor_digest(tensor.dtype, [*tensor.shape])
            dtype, is_finite = FLOATS.get(tensor.dtype), True
            for chunk in _chunks(stream, tensor.end - tensor.begin):
                whole.update(chunk)
                digest.update(chunk)
                # A file that is cut short ends within a value.
                if dtype and (values := len(chunk) // dtype.itemsize):
                    numbers = torch.frombuffer(chunk, dtype=dtype, count=values)
                    is_finite &= bool(numbers.isfinite().all())
            _enter(weights, path, tensor.name, tensor.shape, digest.hexdigest(), is_finite)
        for chunk in _chunks(stream, size):  # What the header does not describe.
            whole.update(chunk)
    weights.files[path.name] = whole.hexdigest()


def _chunks(stream: Any, size: int) -> Iterator[bytearray]:
    while size > 0:
        chunk = bytearray(stream.read(min(CHUNK, size)))
        if not chunk:
            return
        size -= len(chunk)
        yield chunk


def _read_pickle(path: Path, weights: ReadWeights) -> None:
    """Read a file of torch's without running any code in it."""
    with plain_weights(path):
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
        )
    for name, tensor in _tensors_in(content):
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest = _tensor_digest(dtype, list(tensor.shape))
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
        is_finite = not tensor.is_floating_point() or bool(tensor.isfinite().all())
        _enter(weights, path, name, tuple(tensor.shape), digest.hexdigest(), is_finite)
    weights.files[path.name] = file_digest(path)


def _tensors_in(content: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    for key, value in content.items() if isinstance(content, dict) else ():
        if isinstance(value, Tensor):
            yield f"{prefix}{key}", value.detach()
        else:
            yield from _tensors_in(value, f"{prefix}{key}/")


def _tensor_digest(dtype: str, shape: list[int]) -> Any:
    return hashlib.sha256(json.dumps([dtype, shape]).encode())


def _enter(
    weights: ReadWeights,
    path: Path,
    name: str,
    shape: tuple[int, ...],
    digest: str,
    is_finite: bool,
) -> None:
    if name in weights.tensors:
        weights.faults.append(f"{name} is in {path.name} and in another file")
    if not is_finite:
        weights.faults.append(f"{name} in {path.name} has values that are not finite")
    weights.tensors[name], weights.shapes[name] = digest, shape
