"""Reads lists of captioned videos and of prompts from CSV, JSONL or text.

A list is checked as a whole before any work starts; a message names the line that is wrong.
"""

from __future__ import annotations

import csv
import json
import os
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import chain
from pathlib import Path, PureWindowsPath

from videorepa.errors import UserError
from videorepa.system.files import check_is_file, check_is_folder, open_file, parse_json

FIELD_BYTES = 1 << 24
"""The longest CSV field that is read. Captioners write more than Python's own limit of 128 kB."""

CAPTION_COLUMNS = ("caption", "prompt")
"""Where a list of prompts has its captions: the first of these columns that it has."""

DELIMITERS = {",": "commas", ";": "semicolons", "\t": "tabs"}
"""What may stand between a CSV's fields; the first that its header holds is taken. Excel writes
semicolons where commas are decimal."""


IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Entry:
    """A captioned video of a manifest.

    Attributes:
      id: Unique in the manifest.
      path: Where the video should be; whether it is there has not been checked.
      caption: As the manifest has it.
    """

    id: str
    path: Path
    caption: str


@dataclass(frozen=True)
class Prompt:
    """A text to generate a video from.

    Attributes:
      id: Unique in the list.
      text: What the video is generated from.
      caption: What the video is scored against; by default the text.
      row: All values of the row that it was read from, by column.
      image: The image that the video continues, if any; whether it is there has not been checked.
    """

    id: str
    text: str
    caption: str = ""
    row: Mapping[str, object] = field(default_factory=dict, compare=False, repr=False)
    image: Path | None = None

    def __post_init__(self) -> None:
        if not self.caption:
            object.__setattr__(self, "caption", self.text)


@dataclass(frozen=True)
class ListRow:
    """A row's values by column, and the line it starts on, for messages."""

    file: Path
    line: int
    values: dict[str, object]

    def error(self, message: str) -> UserError:
        return UserError(f"{self.file}, line {self.line}: {message}")

    def text(self, *columns: str) -> str:
        """The text in the first of these columns that the row has."""
        column = next((name for name in columns if name in self.values), None)
        if column is None:
            raise self.error(
                f"found the columns {', '.join(map(repr, self.values)) or '(none)'}; "
                f"expected {' or '.join(map(repr, columns))}: rename or add it"
            )
        value = self.values[column]
        if not isinstance(value, str):
            raise self.error(f"{column!r} is {json.dumps(value)[:80]}; expected text in quotes")
        if not value.strip():
            raise self.error(f"{column!r} is empty; fill it in or remove the row")
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise self.error(
                f"{column!r} holds half of a character (a lone surrogate) at position "
                f"{error.start}; write the whole character or remove it"
            ) from error
        return value


def _lines(path: Path) -> Iterator[str]:
    """The file's lines with their ends, cut at "\\n" alone: captions may hold other line breaks."""
    number = 0
    try:
        with open_file(path) as file:
            for number, line in enumerate(file, 1):
                yield line.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}, line {number}: byte {error.start + 1} is {error.object[error.start]:#04x}, "
            "which is not UTF-8; save the file as UTF-8"
        ) from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from error


def csv_rows(path: Path) -> Iterator[ListRow]:
    """Read a CSV file that a user named, row by row; its first row names the columns.

    Raises:
      UserError: The file cannot be read, is not UTF-8 or no CSV, or a row lacks a field.
    """
    if csv.field_size_limit() < FIELD_BYTES:
        csv.field_size_limit(FIELD_BYTES)
    lines = _lines(path)
    first = next(lines, "")
    delimiter = next((mark for mark in DELIMITERS if mark in first), ",")
    fields = f"quotes, {DELIMITERS[delimiter]} or line breaks"
    # Strict, since otherwise a quote that is never closed swallows the rest of the file.
    reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}, line {line}: not valid CSV ({error}); put a field that holds {fields} "
                "in quotes, and double each quote in it"
            ) from error
        if cells is None:
            return
        if not cells:
            continue
        if header is None:
            header = [name.strip() for name in cells]
            twice = sorted({name for name in header if name and header.count(name) > 1})
            if twice:
                raise UserError(
                    f"{path}, line {line}: the column {twice[0]!r} is there more than once; "
                    "rename all but one"
                )
            continue
        if len(cells) != len(header):
            raise UserError(
                f"{path}, line {line}: found {len(cells)} fields, expected {len(header)} "
                f"({', '.join(header)}); a field that holds {fields} must stand in quotes"
            )
        yield ListRow(path, line, dict(zip(header, cells, strict=True)))


def _jsonl_rows(path: Path) -> Iterator[ListRow]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            values = parse_json(line)
        except ValueError as error:
            # The decoder's own message counts lines within this one.
            reason = str(error)
            if isinstance(error, json.JSONDecodeError):
                reason = f"{error.msg} at character {error.pos + 1}"
            raise UserError(
                f"{path}, line {number}: not valid JSON ({reason}); expected one object per line"
            ) from error
        if not isinstance(values, dict):
            raise UserError(
                f"{path}, line {number}: found {line.strip()[:80]}; expected a JSON object, "
                'like {"caption": "..."}'
            )
        yield ListRow(path, number, values)


def _text_rows(path: Path) -> Iterator[ListRow]:
    for number, line in enumerate(_lines(path), 1):
        if line.strip():
            yield ListRow(path, number, {"prompt": line.rstrip("\r\n")})


READERS = {".csv": csv_rows, ".jsonl": _jsonl_rows, ".txt": _text_rows}


def _rows(path: Path, *suffixes: str) -> Iterator[ListRow]:
    """Read a file that ends in one of the suffixes. Raises UserError if it has no rows."""
    try:
        check_is_file(path)
    except OSError as error:
        raise UserError(f"{path} {error.strerror}; expected a list; check its name") from None
    suffix = path.suffix.lower()
    if suffix not in suffixes:
        raise UserError(f"{path} ends in {suffix!r}; expected {' or '.join(suffixes)}")
    return _some(path, READERS[suffix](path))


def read_table(path: Path) -> list[ListRow]:
    """Read the rows of a .csv or .jsonl file, whatever its columns.

    Raises:
      UserError: The file is not usable; the message names the line.
    """
    return list(_rows(path, ".csv", ".jsonl"))


def _some(path: Path, rows: Iterator[ListRow]) -> Iterator[ListRow]:
    row = None
    for row in rows:
        yield row
    if row is None:
        raise UserError(f"{path} holds no rows; expected at least one")


def _add_id(row: ListRow, default: str, lines: dict[str, int]) -> str:
    """Give the row's id, and record in `lines` the line that it stands on."""
    name = row.text("id") if "id" in row.values else default
    first = lines.setdefault(name, row.line)
    if first != row.line:
        raise UserError(
            f"{row.file}, lines {first} and {row.line}: both have the id {name!r}; "
            "ids must differ: remove one row, or give each an 'id' of its own"
        )
    return name


class _Root:
    """The folder that a manifest's paths start from and may not leave, not by a link either."""

    def __init__(self, path: Path, advice: str) -> None:
        self.path, self._advice = path, advice
        self._inside = os.path.join(os.path.realpath(path), "")
        # Each folder is resolved once: a manifest names 100,000 files in few folders.
        self._real_folder = cache(os.path.realpath)
        self._names = cache(_names_in)

    def find(self, row: ListRow, video: str, column: str = "video") -> Path:
        """Where a video, or what else a column names, should be. Raises UserError."""
        if "\0" in video:
            raise row.error(f"{column!r} is {video!r}, which holds a zero byte and names no file")
        if not os.path.isabs(video) and _windows_anchor(video):
            raise row.error(
                f"{column!r} is {video!r}, a path of Windows; write it from the root {self.path} "
                "on, with / between the names"
            )
        path = self._stored(os.path.join(self.path, video))
        if not self._real(path).startswith(self._inside):
            raise row.error(
                f"{column!r} is {video!r}, which leads out of the root {self.path.absolute()}; "
                f"expected a path inside it: correct it, or {self._advice}"
            )
        return Path(path)

    def _real(self, path: str) -> str:
        folder, name = os.path.split(path)
        if name in ("", os.curdir, os.pardir):
            return os.path.realpath(path)
        path = os.path.join(self._real_folder(folder), name)
        return os.path.realpath(path) if os.path.islink(path) else path

    def _stored(self, path: str) -> str:
        """The path itself, or, where nothing is there, one whose accents are composed otherwise:
        macOS writes é as two characters, others mostly as one."""
        if path.isascii() or os.path.lexists(path):
            return path
        folder, name = os.path.split(path)
        folder = self._stored(folder)
        return os.path.join(folder, self._names(folder).get(_composed(name), name))


def _composed(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _names_in(folder: str) -> dict[str, str]:
    """The names in a folder by what they are when composed."""
    try:
        return {_composed(name): name for name in sorted(os.listdir(folder))}
    except OSError:
        return {}


def _windows_anchor(path: str) -> str:
    # Asked first, since the class takes long.
    return PureWindowsPath(path).anchor if "\\" in path or ":" in path else ""


def read_manifest(manifest: str | Path, root: str | Path | None = None) -> list[Entry]:
    """Read the captioned videos that a manifest lists, in its order.

    A CSV has the columns `video` and `caption`, as OpenVid's has, with commas, semicolons or tabs
    between its fields; each line of a JSONL file is an object with these keys. A column `id` is
    optional; by default the id is the `video` value. Other columns are ignored. Captions are kept
    to the letter. A video need not exist: a missing one costs one clip when it is read.

    Args:
      manifest: A .csv or .jsonl file.
      root: The folder that relative paths start from and no path may leave, not through a symlink
        either. By default the manifest's folder.

    Raises:
      UserError: Anything else is wrong; the message names the line.
    """
    manifest = Path(manifest)
    rows = _rows(manifest, ".csv", ".jsonl")
    if root is None:
        advice = f"put {manifest.name} into a folder that holds all videos"
        base = manifest.parent
    else:
        advice, base = "name a root that holds all videos", Path(root)
        check_is_folder(base, f"the folder that {manifest}'s paths start from")
    within = _Root(base, advice)
    entries: list[Entry] = []
    lines: dict[str, int] = {}
    for row in rows:
        video = row.text("video")
        path = within.find(row, video)
        caption = row.text("caption")
        entries.append(Entry(_add_id(row, video, lines), path, caption))
    return entries


def read_prompts(
    path: str | Path,
    column: str | None = None,
    *,
    with_images: bool = False,
    images: Path | None = None,
) -> list[Prompt]:
    """Read a list of prompts, in its order.

    A .txt file has one prompt a line. Each row of a .csv or .jsonl file has a `caption` or, where
    that is missing, a `prompt`. A column `id` is optional; by default the id is the prompt's
    number, "0000", "0001" and on. Empty lines do not count.

    Args:
      path: The list.
      column: The column to generate from, such as `detailed`, instead of the caption. A clip is
        still scored against the caption, if the row has one.
      with_images: Read the column `image`, which names the images that videos continue.
      images: The folder from which its paths start and which they may not leave; by default the
        list's own. A list without the column has an image for each prompt there, called by its id.

    Raises:
      UserError: The list is not usable; the message names the line.
    """
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    named: dict[str, list[Path]] = defaultdict(list)
    if images is not None:
        check_is_folder(images, f"the folder of the images of {path}")
        for file in sorted(images.iterdir()):
            if file.suffix.lower() in IMAGE_SUFFIXES:
                named[file.stem].append(file)
    advice = "name the folder that holds all images with --images"
    within = _Root(images or Path(path).parent, advice)
    for row in _rows(Path(path), ".txt", ".csv", ".jsonl"):
        text = row.text(*([column] if column else CAPTION_COLUMNS))
        has_caption = any(name in row.values for name in CAPTION_COLUMNS)
        caption = row.text(*CAPTION_COLUMNS) if has_caption else text
        name = _add_id(row, f"{len(prompts):04d}", lines)
        image = None
        if with_images and "image" in row.values:
            image = within.find(row, row.text("image"), "image")
        elif images is not None:
            if len(named[name]) != 1:
                raise row.error(
                    f"{images} holds {len(named[name])} images called {name!r}; expected one, such "
                    f"as {name}.png, or a column 'image' in the list"
                )
            image = within.find(row, named[name][0].name, "image")
        prompts.append(Prompt(name, text, caption, row.values, image))
    return prompts
