"""Opens what captioned clips come from: a manifest of video files, or the lab's simulator."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from jaxtyping import UInt8

from videorepa.data.manifest import Entry, read_manifest
from videorepa.data.sampling import Sampling
from videorepa.data.video import Sampled, foresee_sampling, read_first, sample_clip
from videorepa.errors import ClipError, UserError
from videorepa.settings.sections import Data
from videorepa.system.files import check_is_file
from videorepa.system.fingerprint import file_sample_digest


@dataclass(frozen=True)
class SourceClip:
    """Names a clip of a source.

    Args:
      id: Unique in the source.
      caption: The caption, exactly as the source has it.
    """

    id: str
    caption: str


class ClipSource(Protocol):
    """A fixed list of clips, whose frames are read or drawn on demand.

    Attributes:
      items: The clips in their order; methods take an index into it.
    """

    items: list[SourceClip]

    def sample(self, index: int) -> Sampled:
        """Read a clip. Raises ClipError."""
        ...

    def first(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        """Read a clip's first frame, and no more of it than that takes. Raises ClipError."""
        ...

    def foresee(self, index: int) -> Sampling | None:
        """Predict how the clip is sampled, None if that takes reading it. Raises ClipError."""
        ...

    def digest(self, index: int) -> str:
        """Give a text that changes when the clip's content does. Raises ClipError."""
        ...

    def stamp(self, index: int) -> list[int] | None:
        """Give numbers that change when the clip's file is written to, and cost no reading of it.

        None where there is no file, and the digest costs nothing. Raises ClipError.
        """
        ...


def open_source(data: Data) -> ClipSource:
    """Open the source that a recipe names. Raises UserError if its manifest is not usable."""
    if data.lab is not None:
        return LabSource(data)
    return ManifestSource(data)


class ManifestSource:
    """Video files listed in a CSV or JSONL manifest."""

    def __init__(self, data: Data) -> None:
        assert data.manifest is not None
        self.data = data
        self.entries: list[Entry] = read_manifest(data.manifest, data.root or data.manifest.parent)
        self.items = [SourceClip(entry.id, entry.caption) for entry in self.entries]

    def sample(self, index: int) -> Sampled:
        data, path = self.data, self.entries[index].path
        return sample_clip(path, data.frames, data.height, data.width, data.fps)

    def first(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        data, path = self.data, self.entries[index].path
        return read_first(path, data.height, data.width, data.fps)

    def foresee(self, index: int) -> Sampling | None:
        return foresee_sampling(self.entries[index].path, self.data.frames, self.data.fps)

    def digest(self, index: int) -> str:
        try:
            return file_sample_digest(self.entries[index].path)
        except OSError as error:
            raise ClipError(f"the video cannot be read: {error.strerror}") from None

    def stamp(self, index: int) -> list[int] | None:
        path = self.entries[index].path
        try:
            check_is_file(path)
            status = path.stat()
        except OSError as error:
            raise ClipError(f"the video cannot be read: {error.strerror}") from None
        # Copying a file can keep the time of its last change, but not that of its last move.
        return [status.st_size, status.st_mtime_ns, status.st_ctime_ns]


class LabSource:
    """Clips that the lab's simulator draws on demand.

    Raises:
      UserError: The recipe's clips do not have the simulator's size.
    """

    def __init__(self, data: Data) -> None:
        from videorepa.world.scenarios import draw_scene
        from videorepa.world.simulator import SIZE

        lab = data.lab
        assert lab is not None
        if (data.height, data.width) != (SIZE, SIZE):
            raise UserError(
                f"The lab draws {SIZE}x{SIZE} frames; the recipe asks for "
                f"{data.height}x{data.width}. Set data.height and data.width to {SIZE}."
            )
        self.lab, self.count = lab, data.frames
        self.series = f"lab-{lab.seed}" + ("-beyond" if lab.split == "beyond" else "")
        self.items = [
            SourceClip(
                f"{self.series}-{index}", draw_scene(lab.seed, index, split=lab.split).caption
            )
            for index in range(lab.clips)
        ]

    def sample(self, index: int) -> Sampled:
        from videorepa.world.render import make_clip

        clip = make_clip(self.lab.seed, index, frames=self.count, split=self.lab.split)
        return Sampled(clip.frames, self.foresee(index), clip.scene)

    def first(self, index: int) -> UInt8[np.ndarray, "h w 3"]:
        return self.sample(index).frames[0]

    def foresee(self, index: int) -> Sampling:
        from videorepa.world.simulator import FPS

        return Sampling(self.count, 1, FPS)

    def digest(self, index: int) -> str:
        from videorepa.world.simulator import VERSION

        return f"{self.series}-{index} of version {VERSION}"

    def stamp(self, index: int) -> list[int] | None:
        return None
