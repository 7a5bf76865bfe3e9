"""Clips in the layout of `generate`: a video and a JSON sidecar each, and a file on all of them.

Clips from elsewhere, without sidecars, are read from a list of videos and captions.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from videorepa.artifacts.reading import first_fault
from videorepa.data.manifest import read_manifest
from videorepa.data.video import read_shape
from videorepa.errors import ClipError, UserError
from videorepa.system.files import (
    atomic_write,
    check_is_folder,
    file_digest,
    is_vacant,
    read_text,
    short_name,
    sweep,
)
from videorepa.system.fingerprint import json_digest

GENERATION = "generation.json"

CLIPS = "a folder of clips or a list of them"

Key = tuple[str, int]
"""Which clip of a folder: the prompt's id and the number of the sample, k."""

DIGEST = 16
"""Hexadecimal digits of a clip's digest."""


class CaptionedClip(BaseModel):
    """A clip and the prompt that it belongs to.

    Attributes:
        path: The video file.
        prompt: What the clip was generated from.
        caption: What the clip is scored against: the prompt, unless that was a detailed version.
        k: Number of the sample for the prompt, from 0.
        model_digest: Digest of the model's weights; None for clips from elsewhere.
    """

    model_config = ConfigDict(frozen=True, coerce_numbers_to_str=True, protected_namespaces=())

    path: Path = Field(exclude=True)
    prompt_id: str
    prompt: str
    caption: str = ""
    k: int
    model_digest: str | None = None

    @model_validator(mode="after")
    def _caption_by_default(self) -> Self:
        if not self.caption:
            object.__setattr__(self, "caption", self.prompt)
        return self

    @property
    def key(self) -> Key:
        return self.prompt_id, self.k

    @classmethod
    def read(cls, sidecar: Path) -> Self:
        """Read a sidecar. Raises UserError if it is damaged."""
        try:
            values = json.loads(read_text(sidecar))
            return cls.model_validate({**values, "path": sidecar.with_suffix(".mp4")})
        except ValidationError as error:
            reason = first_fault(error)
        except (OSError, ValueError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"{sidecar} is not a sidecar that `generate` wrote ({reason}). Remove it, or generate "
            "its clip again."
        )


class MadeWith(BaseModel):
    """How clips were generated. It stands in `generation.json` and in every sidecar.

    Attributes:
        model: Name of the model.
        model_digest: Digest of the model's weights.
        fps: Frames per second.
        height: In pixels.
        width: In pixels.
        steps: Denoising steps; None for clips from elsewhere.
        guidance_scale: Strength of classifier-free guidance; None for clips from elsewhere.
    """

    # Further settings are kept as they are.
    model_config = ConfigDict(frozen=True, extra="allow", protected_namespaces=())

    model: str
    model_digest: str | None = None
    fps: int | float = Field(gt=0)
    frames: int
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    steps: int | None
    guidance_scale: float | None

    def claim(self, folder: Path) -> None:
        """Make `folder` the folder of clips that are generated like this.

        Raises:
            UserError: It holds something else, or clips that were generated in another way.
        """
        path, now = folder / GENERATION, self.model_dump()
        # In this order, since another process that was started with this one may be writing it.
        in_use = not is_vacant(folder)
        if path.exists():
            try:
                before = json.loads(read_text(path))
                differing = [key for key in now if before.get(key) != now[key] and key != "samples"]
            except (OSError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{path} is damaged ({error}); it says what the clips were made with. Delete "
                    "it and the clips beside it, or choose another folder with --out."
                ) from None
            if differing:
                raise UserError(
                    f"{folder} holds clips made otherwise; they differ in "
                    + ", ".join(f"{key} ({before.get(key)}, now {now[key]})" for key in differing)
                    + ". Choose another folder with --out."
                )
        elif in_use:
            raise UserError(
                f"{folder} exists and does not hold generated clips. Choose another --out."
            )
        folder.mkdir(parents=True, exist_ok=True)
        sweep(folder)
        if not path.exists():
            atomic_write(path, json.dumps(now, indent=1))


class Sidecar(CaptionedClip, MadeWith):
    """A clip with everything that `generate` writes beside it.

    Attributes:
        seed: Seed of the noise; None for clips from elsewhere.
    """

    seed: int | None

    @property
    def is_done(self) -> bool:
        return self.path.exists() and self.path.with_suffix(".json").exists()

    def write(self) -> None:
        """Write the sidecar. It comes after the video, since a clip without one is not done."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False)
        atomic_write(self.path.with_suffix(".json"), text)


def clip_path(folder: Path, prompt_id: str, k: int) -> Path:
    """Where `generate` puts a clip. A digest replaces an id that is unfit for a file's name."""
    is_safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", prompt_id)
    return folder / f"{prompt_id if is_safe else json_digest(prompt_id)}-{k}.mp4"


def clips_of(videos: Path) -> Iterator[CaptionedClip]:
    """The clips of a folder, or of a list as `evaluate` takes it, whether they can be read or not.

    Raises:
        UserError: A sidecar or the list is damaged.
    """
    if videos.is_file():
        return _of_list(videos)
    check_is_folder(videos, CLIPS)
    return map(CaptionedClip.read, _sidecars(videos))


def readable_clips(videos: Path) -> dict[Key, Sidecar]:
    """The clips of a folder or a list, without those whose video is missing, empty or unreadable.

    Of clips in a folder only the sidecars are read, for their size and rate.

    Raises:
        UserError: There is no such clip, or a sidecar or the list is damaged.
    """
    if videos.is_file():
        elsewhere = {"model": short_name(videos), "seed": None, "steps": None}
        clips = [
            Sidecar.model_validate({**dict(clip), **shape, **elsewhere, "guidance_scale": None})
            for clip in _of_list(videos)
            if (shape := clip_shape(clip.path))
        ]
        if not clips:
            raise UserError(
                f"None of the clips that {videos} lists can be read. Are the paths right?"
            )
    else:
        check_is_folder(videos, CLIPS)
        with_video = (path for path in _sidecars(videos) if _has_content(path.with_suffix(".mp4")))
        clips = [Sidecar.read(path) for path in with_video]
        if not clips:
            raise UserError(
                f"{videos} holds no clip. Expected <prompt id>-<k>.mp4 files with a .json beside "
                "each, as `videorepa generate` writes them."
            )
    return {clip.key: clip for clip in clips}


def clip_shape(path: Path) -> dict[str, Any] | None:
    """A video's fps, frames, height and width, or None if it cannot be read."""
    try:
        return read_shape(path)._asdict()
    except ClipError:
        return None


def clip_digest(clip: Path) -> str:
    """What a clip is called beside a page and in ratings: the first 16 hexadecimal digits of the
    SHA-256 of its content."""
    return file_digest(clip)[:DIGEST]


def _of_list(path: Path) -> Iterator[CaptionedClip]:
    for entry in read_manifest(path):
        yield CaptionedClip(path=entry.path, prompt_id=entry.id, prompt=entry.caption, k=0)


def _sidecars(folder: Path) -> list[Path]:
    # A killed process leaves half-written files behind, under hidden names.
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if path.name != GENERATION and not path.name.startswith(".")
    ]


def _has_content(video: Path) -> bool:
    return video.is_file() and video.stat().st_size > 0
