"""Generated clips and their sidecars, as `generate` leaves them in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
from av.error import FFmpegError
from pydantic import BaseModel, ConfigDict, Field

from videorepa.artifacts.reading import json_object, parse
from videorepa.data.manifest import read_manifest
from videorepa.errors import UserError
from videorepa.system.files import atomic_write, file_digest, is_vacant, short_name, sweep


def clips_of_list(path: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for entry in read_manifest(path):
        yield entry.path, {"prompt_id": entry.id, "caption": entry.caption, "k": 0}


def clips_of_folder(videos: Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    for path in sorted(videos.glob("*.json")):
        # Hidden names are what a killed process left behind.
        if path.name == "generation.json" or path.name.startswith("."):
            continue
        try:
            about = json.loads(path.read_text(encoding="utf-8"))
            yield (
                path.with_suffix(".mp4"),
                about
                | {
                    "prompt_id": str(about["prompt_id"]),
                    # What it was generated from, unless that was a detailed version of it.
                    "caption": str(about.get("caption", about["prompt"])),
                    "k": int(about["k"]),
                },
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is not a sidecar that `generate` wrote ({type(error).__name__}: {error}). "
                "Remove it, or generate its clip again."
            ) from None


def check_clip_folder(out: Path, about: dict[str, Any]) -> None:
    path = out / "generation.json"
    # In this order: another process that was started with this one may be writing it.
    begun = not is_vacant(out)
    if path.exists():
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            differing = [key for key in about if found.get(key) != about[key] and key != "samples"]
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path} is damaged ({error}); it says what the clips were made with. Delete it "
                "and the clips beside it, or choose another folder with --out."
            ) from None
        if differing:
            raise UserError(
                f"{out} holds clips made otherwise; they differ in "
                + ", ".join(f"{key} ({found.get(key)}, now {about[key]})" for key in differing)
                + ". Choose another folder with --out."
            )
    elif begun:
        raise UserError(f"{out} exists and does not hold generated clips. Choose another --out.")
    out.mkdir(parents=True, exist_ok=True)
    sweep(out)
    if not path.exists():
        atomic_write(path, json.dumps(about, indent=1))


Key = tuple[str, int]
"""Which clip of a generation folder: the prompt's id and the sample's number k."""


class Sidecar(BaseModel):
    """What a generated clip says of itself, with the clip's own path.

    seed, steps, guidance_scale: None for clips from elsewhere, of which nobody says it.
    """

    model_config = ConfigDict(frozen=True, protected_namespaces=())

    path: Path
    prompt_id: str
    prompt: str
    k: int
    seed: int | None
    fps: float = Field(gt=0)
    frames: int
    height: int = Field(gt=0)
    width: int = Field(gt=0)
    steps: int | None
    guidance_scale: float | None
    model: str


def clip_shape(path: Path) -> dict[str, Any] | None:
    """A clip's fps, frames, height and width, or None when it cannot be read: one bad clip should
    not cost the page."""
    try:
        with av.open(str(path.absolute())) as container:
            stream = container.streams.video[0]
            rate, size = stream.average_rate, {"height": stream.height, "width": stream.width}
            return {"fps": float(rate), "frames": stream.frames, **size} if rate else None
    except (FFmpegError, OSError, IndexError):
        return None


def read_generation(folder: Path) -> dict[Key, Sidecar]:
    """Read a generation folder's clips, or those of a list as `evaluate` takes it; a clip whose
    video is missing or empty is left out.

    Raises UserError when there is no clip, or a sidecar or the list is damaged.
    """
    if folder.is_file():
        return sidecars_of_list(folder)
    clips: dict[Key, Sidecar] = {}
    for sidecar in sorted(folder.glob("*.json")):
        video = sidecar.with_suffix(".mp4")
        # A killed process leaves half-written files behind, under hidden names.
        if sidecar.name.startswith("."):
            continue
        if video.is_file() and video.stat().st_size > 0:
            clip = parse(Sidecar, {**json_object(sidecar), "path": video}, str(sidecar))
            clips[clip.prompt_id, clip.k] = clip
    if not clips:
        what = "holds no clip" if folder.is_dir() else "does not exist"
        raise UserError(
            f"{folder} {what}. Expected <prompt id>-<k>.mp4 files with a .json beside each, as "
            "`videorepa generate` writes them."
        )
    return clips


def sidecars_of_list(path: Path) -> dict[Key, Sidecar]:
    clips = {
        (entry.id, 0): Sidecar(
            path=entry.path,
            prompt_id=entry.id,
            prompt=entry.caption,
            k=0,
            model=short_name(path),
            seed=None,
            steps=None,
            guidance_scale=None,
            **shape,
        )
        for entry in read_manifest(path)
        if (shape := clip_shape(entry.path))
    }
    if not clips:
        raise UserError(f"None of the clips that {path} lists can be read. Are the paths right?")
    return clips


DIGEST = 16


def clip_digest(clip: Path) -> str:
    """What a clip is called beside a page and in ratings of it: the first 16 hexadecimal digits of
    its content's SHA-256."""
    return file_digest(clip)[:DIGEST]
