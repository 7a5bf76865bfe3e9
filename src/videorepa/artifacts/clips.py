"""Writes and reads clips in the layout of `generate`: videos, each with a JSON sidecar.

`generation.json` beside them says how all of them were made. Clips from elsewhere, without
sidecars, are read from a list of videos and captions.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Sequence
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
    parse_json,
    read_bytes,
    read_text,
    short_name,
    until_changed,
)
from videorepa.system.fingerprint import json_digest

GENERATION = "generation.json"

SELECTION = "selection.json"
"""Says how the clips beside it were chosen among several of a prompt."""

IMAGES = "images"
"""The folder, beside clips, of the images that they continue, as their model was shown them."""

FILMED = "filmed"
"""The folder, beside clips, of what happened in their place, where it was filmed."""

CLIPS = "a folder of clips or a list of them"

Key = tuple[str, int]
"""Identifies a clip of a folder: the prompt's id and the number of the sample, k."""

DIGEST = 16
"""The number of hexadecimal digits of a clip's digest."""


class CaptionedClip(BaseModel):
    """A clip and the prompt that it belongs to.

    Attributes:
        path: The video file.
        prompt_id: The prompt's id in its list.
        prompt: What the clip was generated from.
        caption: What the clip is scored against: the prompt, or the caption that it elaborates.
        k: The number of the sample for the prompt, from 0.
        model_digest: The digest of the model, as `Model.digest`; None for clips from elsewhere.
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
            values = parse_json(read_text(sidecar))
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
    """How clips were generated.

    Every sidecar has it, and `generation.json` together with the ids of the prompts.

    Attributes:
        model: The model's name.
        model_digest: The digest of the model, as `Model.digest`.
        fps: Frames per second.
        frames: The number of frames of a clip.
        height: In pixels.
        width: In pixels.
        steps: Denoising steps; None for clips from elsewhere.
        guidance_scale: The strength of classifier-free guidance; None for clips from elsewhere.
        scheduler: The class of diffusers that sampled them; None for clips from elsewhere.
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
    scheduler: str | None = None


class Sidecar(CaptionedClip, MadeWith):
    """A clip with everything that `generate` writes beside it.

    Attributes:
        seed: The seed of the noise; None for clips from elsewhere.
    """

    seed: int | None

    @property
    def sidecar(self) -> Path:
        return self.path.with_suffix(".json")

    @property
    def is_done(self) -> bool:
        return self.path.exists() and self.sidecar.exists()

    @property
    def image(self) -> object:
        """The digest of the image that the clip continues; None for a clip from text alone."""
        return (self.model_extra or {}).get("image")

    @property
    def kept_image(self) -> Path | None:
        """The image that the clip continues, as its model was shown it, if it is kept."""
        return _kept_image(self.path.parent, self.image)

    @property
    def kept_film(self) -> Path | None:
        """What happened in the clip's place, if it was filmed and is kept."""
        return _kept_film(self.path.parent, self.prompt_id)

    def write(self) -> None:
        """Write the sidecar. Write the video first: a clip is done once its sidecar is there."""
        text = json.dumps(self.model_dump(), indent=1, ensure_ascii=False)
        atomic_write(self.sidecar, text)


def clip_path(folder: Path, prompt_id: str, k: int) -> Path:
    """Give the file of a clip."""
    return folder / f"{_in_file_names(prompt_id)}-{k}.mp4"


def _in_file_names(prompt_id: str) -> str:
    """A prompt's id, or a digest of one that is unfit for a file's name."""
    is_safe = re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]{0,79}", prompt_id)
    return prompt_id if is_safe else json_digest(prompt_id)


def image_path(folder: Path, digest: str) -> Path:
    """Where a folder of clips keeps an image that clips continue."""
    return folder / IMAGES / f"{digest}.png"


def filmed_path(folder: Path, prompt_id: str) -> Path:
    """Where a folder of clips keeps what happened in the place of a prompt's clips."""
    return folder / FILMED / f"{_in_file_names(prompt_id)}.mp4"


def claim(folder: Path, made_with: MadeWith, clips: Sequence[Sidecar]) -> None:
    """Make `folder` the folder of these clips, of which some may be there already.

    A clip that is there keeps its video if only its caption is another one, and gets a new sidecar.

    Args:
        made_with: How all of them are generated.
        clips: All clips that the folder is for.

    Raises:
        UserError: The folder holds something else, or clips that are of other prompts, captions or
            seeds than these or were generated in another way.
    """
    path = folder / GENERATION
    # In this order, since another process that was started with this one may be writing it.
    in_use = not is_vacant(folder)
    if (folder / SELECTION).exists():
        raise UserError(
            f"{folder} holds clips that `videorepa select` chose. Choose another folder with --out."
        )
    if path.exists():
        if differing := _differing(_generation(path), made_with.model_dump()):
            raise UserError(
                f"{folder} holds clips made otherwise; they differ in {_in_words(differing)}. "
                "Choose another folder with --out."
            )
    elif in_use:
        raise UserError(f"{folder} exists and does not hold generated clips. Choose another --out.")
    done = [(clip, Sidecar.read(clip.sidecar)) for clip in clips if clip.is_done]
    others = [
        (clip, differing)
        for clip, before in done
        if (differing := _differing(before.model_dump(), clip.model_dump())).keys() - {"caption"}
    ]
    if others:
        clip, differing = others[0]
        if "prompt" in differing:  # The rest follows from it.
            differing = {"prompt": differing["prompt"]}
        more = f", as {len(others) - 1} more do" if len(others) > 1 else ""
        raise UserError(
            f"{clip.path} is another clip than the one to be made here; it differs in "
            f"{_in_words(differing)}{more}. Choose another folder with --out, or delete what "
            "differs. Prompts keep their clips when lines move if they have an `id` of their own."
        )
    folder.mkdir(parents=True, exist_ok=True)
    for clip, before in done:
        if before.caption != clip.caption:
            clip.write()
    prompts = list(dict.fromkeys(clip.prompt_id for clip in clips))
    text = json.dumps(made_with.model_dump() | {"prompts": prompts}, indent=1, ensure_ascii=False)
    if not path.exists() or read_bytes(path) != text.encode():
        atomic_write(path, text)


def _kept_image(folder: Path, digest: object) -> Path | None:
    """The image of a sidecar's digest, if it is kept; what is no digest could lead elsewhere."""
    if not re.fullmatch("[0-9a-f]+", str(digest)):
        return None
    path = image_path(folder, str(digest))
    return path if path.is_file() else None


def _kept_film(folder: Path, prompt_id: str) -> Path | None:
    path = filmed_path(folder, prompt_id)
    return path if path.is_file() else None


def write_chosen(videos: Path, out: Path, chosen: Sequence[CaptionedClip]) -> None:
    """Copy clips of a folder into an empty one in the same layout, each as its prompt's sample 0.

    Numbered so, clips chosen from two models are compared prompt by prompt. The sidecar keeps the
    number of before as "chosen_k". The images that they continue, and what was filmed in their
    place, come along.

    Args:
        videos: A folder with sidecars.
        chosen: One clip of each prompt.
    """
    path = videos / GENERATION
    generation = _generation(path) if path.is_file() else {}
    prompts = {"prompts": [clip.prompt_id for clip in chosen], "samples": 1}
    files = {out / GENERATION: generation | prompts}
    for clip in chosen:
        copy = clip_path(out, clip.prompt_id, 0)
        shutil.copyfile(clip.path, copy)
        sidecar = parse_json(read_text(clip.path.with_suffix(".json")))
        files[copy.with_suffix(".json")] = sidecar | {"k": 0, "chosen_k": clip.k}
        for file in (
            _kept_film(videos, clip.prompt_id),
            _kept_image(videos, sidecar.get("image")),
        ):
            if file is not None:
                to = out / file.relative_to(videos)
                to.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, to)
    for file, values in files.items():
        atomic_write(file, json.dumps(values, indent=1, ensure_ascii=False))


def clips_of(videos: Path) -> tuple[list[CaptionedClip], list[CaptionedClip]]:
    """Read the clips of a folder or of a list, whether their videos can be read or not.

    Args:
        videos: A folder with sidecars, or a manifest of videos and captions.

    Returns:
        The clips that count, and those left over: a folder's clips that are not of the prompts and
        samples that `generate` was last told to make there, since lines of the list were removed.

    Raises:
        UserError: A sidecar, the folder's `generation.json` or the list is damaged.
    """
    if videos.is_file():
        return list(_of_list(videos)), []
    check_is_folder(videos, CLIPS)
    wanted = _is_wanted(videos)
    counted: list[CaptionedClip] = []
    others: list[CaptionedClip] = []
    for clip in map(CaptionedClip.read, _sidecars(videos)):
        (counted if wanted(clip) else others).append(clip)
    return counted, others


def left_over(videos: Path) -> list[CaptionedClip]:
    """Read the clips of a folder that are left over; see `clips_of`. A list has none."""
    return [] if videos.is_file() else clips_of(videos)[1]


def readable_clips(videos: Path) -> dict[Key, Sidecar]:
    """Read the clips of a folder or a list, without those whose video is missing or empty.

    A list's videos are opened for their size and rate, and those that cannot be read are left out.
    For a folder's clips the sidecars have both. Clips that `left_over` gives are left out.

    Raises:
        UserError: No clip is left, or a sidecar, `generation.json` or the list is damaged.
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
        wanted = _is_wanted(videos)
        clips = [clip for clip in map(Sidecar.read, with_video) if wanted(clip)]
        if not clips:
            raise UserError(
                f"{videos} holds no clip. Expected <prompt id>-<k>.mp4 files with a .json beside "
                "each, as `videorepa generate` writes them."
            )
    return {clip.key: clip for clip in clips}


def clip_shape(path: Path) -> dict[str, Any] | None:
    """Read a video's fps, frames, height and width; None if it cannot be read."""
    try:
        return read_shape(path)._asdict()
    except ClipError:
        return None


@until_changed
def clip_digest(clip: Path) -> str:
    """What a clip is called in rows of scores, in ratings and beside a page.

    Returns:
        The first 16 hexadecimal digits of the SHA-256 of its content.

    Raises:
        OSError: The file cannot be read.
    """
    return file_digest(clip)[:DIGEST]


def _generation(path: Path) -> dict[str, Any]:
    try:
        values = parse_json(read_bytes(path))
        listed, samples = values.get("prompts", []), values.get("samples", 1)
        if not (all(isinstance(name, str) for name in listed) and isinstance(samples, int)):
            raise ValueError(f"its prompts are {str(listed)[:80]}, its samples {samples!r}")
        return values
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({error}); it says what the clips beside it were made with. Delete "
            "it to score them as they are; to generate, choose another folder with --out."
        ) from None


def _is_wanted(folder: Path) -> Callable[[CaptionedClip], bool]:
    """Whether a clip in the folder is one that `generate` was last told to make there."""
    path = folder / GENERATION
    generation = _generation(path) if path.is_file() else {}
    if "prompts" not in generation:
        return lambda clip: True
    prompts, samples = set(generation["prompts"]), generation.get("samples", 1)
    return lambda clip: clip.prompt_id in prompts and clip.k < samples


def _differing(before: dict[str, Any], now: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The values that differ, by key. A clip is the same however many there are of its prompt."""
    # A clip from text alone says nothing of an image, and one that is not squeezed not of that.
    before, now = ({"image": "none", "whole_image": False} | v for v in (before, now))
    return {
        key: (before.get(key, "not recorded"), value)
        for key, value in now.items()
        if key != "samples" and before.get(key, "not recorded") != value
    }


def _in_words(differing: dict[str, tuple[Any, Any]]) -> str:
    return ", ".join(
        f"{key} ({str(before)[:80]}, now {str(now)[:80]})"
        for key, (before, now) in differing.items()
    )


def _of_list(path: Path) -> Iterator[CaptionedClip]:
    for entry in read_manifest(path):
        yield CaptionedClip(path=entry.path, prompt_id=entry.id, prompt=entry.caption, k=0)


def _sidecars(folder: Path) -> list[Path]:
    # A killed process leaves half-written files with hidden names.
    return [
        path
        for path in sorted(folder.glob("*.json"))
        if path.name not in (GENERATION, SELECTION) and not path.name.startswith(".")
    ]


def _has_content(video: Path) -> bool:
    return video.is_file() and video.stat().st_size > 0
