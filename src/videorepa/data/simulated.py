"""Writes simulated clips as video files with a manifest."""

from __future__ import annotations

from pathlib import Path

from videorepa.data.video import write_video
from videorepa.system.files import atomic_write, csv_text
from videorepa.system.progress import track

CLIP_SEED = 77
"""The seed of the clips that the demo fine-tunes on; the base model has not seen them."""


def simulate_clips(folder: Path, count: int) -> None:
    """Write simulated clips into a folder, with a manifest `clips.csv` in OpenVid's layout.

    The manifest is written last. A folder that has one already stays as it is.
    """
    from videorepa.world.render import make_clip
    from videorepa.world.simulator import FPS

    manifest = folder / "clips.csv"
    if manifest.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in track(range(count), "simulate"):
        clip = make_clip(CLIP_SEED, index)
        write_video(folder / f"{index:04d}.mp4", clip.frames, FPS)
        rows.append({"video": f"{index:04d}.mp4", "caption": clip.caption})
    atomic_write(manifest, csv_text(("video", "caption"), rows))
