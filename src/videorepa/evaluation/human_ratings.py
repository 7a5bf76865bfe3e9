"""Reads people's ratings of clips: PhyGround's annotations, VideoPhy's tables, or a plain table."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from videorepa.artifacts.reading import json_object
from videorepa.data.manifest import ListRow, read_table
from videorepa.errors import UserError
from videorepa.system.wording import shown

ANNOTATIONS = "annotator_*.json"

GENERAL = ("SA", "PTV", "persistence")

LIKERT = (1, 2, 3, 4, 5)

ENDINGS = (".mp4", ".webm", ".mov", ".avi", ".mkv", ".gif")

MAJORITIES = ("majority_sa", "majority_pc")

EXPECTED = (
    f"PhyGround's {ANNOTATIONS}, or a folder of them; VideoPhy's .csv with video_url and "
    f"{', '.join(MAJORITIES)} or sa, pc; or a .csv with id or clip, rating, and perhaps k, "
    "dimension and rater"
)


@dataclass(frozen=True)
class HumanRating:
    """A person's rating of a clip, or the majority's.

    Attributes:
        clip: The names of the clip's folders and file, from the outside in, without its ending.
        k: The number of the sample.
        dimension: What was rated, such as "pc", in small letters.
        law: The law that was rated, as a part of pc; None for the whole dimension.
        source: The file, and the place in it.
    """

    clip: tuple[str, ...]
    k: int
    dimension: str
    law: str | None
    rater: str
    value: float
    source: str


@dataclass
class HumanRatings:
    """The ratings of all files.

    Attributes:
        empty: Number of places for a rating that are empty, or say that it does not apply.
    """

    ratings: list[HumanRating] = field(default_factory=list)
    empty: int = 0


def read_human_ratings(paths: Sequence[Path]) -> HumanRatings:
    """Read files of ratings.

    Raises:
        UserError: A file has another layout, a value is none of its scale, or a rater has rated a
            clip twice.
    """
    found = HumanRatings()
    for path in _files(paths):
        if path.suffix.lower() == ".json":
            _add_annotations(path, found)
        else:
            _add_table(path, found)
    first: dict[tuple[Any, ...], HumanRating] = {}
    for one in found.ratings:
        key = (one.clip, one.k, one.dimension, one.law, one.rater)
        earlier = first.setdefault(key, one)
        if earlier is not one:
            raise UserError(
                f"{'/'.join(one.clip)} has two ratings of {one.law or one.dimension} by "
                f"{one.rater}: {earlier.source} and {one.source}. Take one away; ratings of "
                "several people need their raters' names."
            )
    if not found.ratings:
        raise UserError(
            f"{', '.join(map(str, paths))} holds no rating ({found.empty} places are empty). "
            f"Expected {EXPECTED}."
        )
    return found


def _files(paths: Sequence[Path]) -> Iterator[Path]:
    for path in paths:
        if not path.is_dir():
            yield path
            continue
        files = sorted(path.glob(ANNOTATIONS))
        if not files:
            raise UserError(f"{path} holds no {ANNOTATIONS}. Expected {EXPECTED}.")
        yield from files


def _add_annotations(path: Path, found: HumanRatings) -> None:
    """Add what one annotator of PhyGround rated; pc is the mean of an annotation's laws."""
    data = json_object(path)
    annotations, rater = data.get("annotations"), data.get("annotator_id")
    if not isinstance(annotations, list) or rater is None:
        raise UserError(
            f"{path} has the keys {', '.join(data) or '(none)'}; expected PhyGround's "
            "annotator_id, num_annotations and annotations."
        )
    if data.get("num_annotations") != len(annotations):
        raise UserError(
            f"{path} holds {len(annotations)} annotations and says {data.get('num_annotations')!r}"
            ". It was cut or changed; download it again."
        )
    for number, entry in enumerate(annotations, 1):
        source = f"{path}, annotation {number}"
        try:
            clip = (str(entry["model"]), clip_names(entry["video"])[-1])
            general, laws = entry["scores"]["general"], entry["scores"]["physical"]
            own, absent = set(entry["physical_laws"]), set(entry.get("na_laws") or ())
            fits = isinstance(general, dict) and set(general) <= set(GENERAL)
            fits = fits and isinstance(laws, dict) and set(laws) <= own
            fits = fits and all(isinstance(law, str) and law for law in own)
        except (KeyError, TypeError, AttributeError, IndexError):
            fits = False
        if not fits:
            raise UserError(
                f"{source} is {shown(entry)}; expected model, video, physical_laws and scores, "
                f"with general ({', '.join(GENERAL)}) and physical (laws of physical_laws)."
            )
        rated: dict[tuple[str, str | None], float | None] = {
            (name.lower(), None): _value(general.get(name), LIKERT, f"{source}, {name}")
            for name in GENERAL
        }
        for law in sorted(own):
            value = _value(laws.get(law), LIKERT, f"{source}, {law}")
            rated["pc", law] = None if law in absent else value
        found.empty += sum(value is None for value in rated.values())
        of_laws = [value for (_, law), value in rated.items() if law and value is not None]
        if of_laws:
            rated["pc", None] = sum(of_laws) / len(of_laws)
        found.ratings += [
            HumanRating(clip, 0, dimension, law, str(rater), value, source)
            for (dimension, law), value in rated.items()
            if value is not None
        ]


def _add_table(path: Path, found: HumanRatings) -> None:
    rows = read_table(path)
    columns = rows[0].values.keys()
    if "rating" in columns and columns & {"id", "clip"}:
        for row in rows:
            _add_plain(row, found)
        return
    for names in (MAJORITIES, ("sa", "pc")):
        if "video_url" in columns and columns >= set(names):
            break
    else:
        raise UserError(f"{path} has the columns {', '.join(columns)}. Expected {EXPECTED}.")
    clips = _shortest([clip_names(row.text("video_url")) for row in rows])
    for name in names:
        column = [_number(row.values.get(name), f"{path}, line {row.line}") for row in rows]
        # VideoPhy's ratings are 0 or 1, and VideoPhy-2's are 1 to 5, in columns of the same name.
        graded = name not in MAJORITIES and any(v is not None and v > 1 for v in column)
        for row, clip, number in zip(rows, clips, column, strict=True):
            source = f"{path}, line {row.line}"
            value = _value(number, LIKERT if graded else (0, 1), f"{source}, {name}")
            if value is None:
                found.empty += 1
                continue
            dimension = name.removeprefix("majority_")
            found.ratings.append(HumanRating(clip, 0, dimension, None, "people", value, source))


def _add_plain(row: ListRow, found: HumanRatings) -> None:
    values, source = row.values, f"{row.file}, line {row.line}"
    value = _number(values.get("rating"), source)
    name, k = values.get("id") or values.get("clip"), values.get("k") or 0
    if not name or not re.fullmatch("[0-9]{1,9}", str(k)):
        raise UserError(f"{source} is {shown(values)}; expected an id or a clip, and k from 0.")
    if value is None:
        found.empty += 1
        return
    dimension = str(values.get("dimension") or "rating").lower()
    rater = str(values.get("rater") or "people")
    found.ratings.append(
        HumanRating(clip_names(name), int(str(k)), dimension, None, rater, value, source)
    )


def _number(value: object, source: str) -> float | None:
    """A rating as a number; None if the place is empty or holds no number that is finite."""
    if value is None or not str(value).strip():
        return None
    try:
        number = float(str(value))
    except ValueError:
        raise UserError(f"{source}: the rating is {shown(value)}; expected a number.") from None
    return number if math.isfinite(number) else None


def _value(value: object, scale: Sequence[int], source: str) -> float | None:
    number = _number(value, source)
    if number is not None and number not in scale:
        raise UserError(
            f"{source}: the rating is {number:g}; expected {scale[0]} to {scale[-1]}, or nothing "
            "where there is no rating."
        )
    return number


def clip_names(name: object) -> tuple[str, ...]:
    """The names in a path or an address from the outside in, without the file's ending."""
    path = urlsplit(str(name)).path if "://" in str(name) else str(name)
    parts = [part for part in path.split("/") if part] or [""]
    ending = Path(parts[-1]).suffix
    return (*parts[:-1], parts[-1].removesuffix(ending if ending.lower() in ENDINGS else ""))


def _shortest(clips: Sequence[tuple[str, ...]]) -> list[tuple[str, ...]]:
    """The fewest last names that tell the clips apart, or all names where they are the same."""
    most = max(map(len, clips))
    for length in range(1, most):
        short = [clip[-length:] for clip in clips]
        if len(set(short)) == len(set(clips)):
            return short
    return list(clips)
