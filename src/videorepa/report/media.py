"""Keeps a page's clips: within the page if they are small in all, else beside it."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterable
from pathlib import Path
from urllib.parse import quote

from videorepa.artifacts.clips import DIGEST, clip_digest
from videorepa.system.files import link_or_copy, read_bytes

EMBEDDED_BYTES = 4 << 20
"""Clips of up to this many bytes in all stay within the page."""

KINDS = {".mp4": "video/mp4", ".png": "image/png"}
"""The media types of what a page shows, by the suffixes that its files get."""


def _suffix(file: Path) -> str:
    """A file's suffix on the page. All but images are clips, whatever they are called."""
    return ".png" if file.suffix == ".png" else ".mp4"


class Media:
    """The clips of a page, and the images that they continue.

    A file beside the page is named by its digest. So its name does not reveal the model, equal
    clips are kept once, and an existing file has the right content.

    Args:
        page: The page's path.
        clips: The videos and images that the page shows.
    """

    def __init__(self, page: Path, clips: Iterable[Path]) -> None:
        self.digests = {clip: clip_digest(clip) for clip in clips}
        self._clips = {digest: clip for clip, digest in self.digests.items()}
        self.bytes = sum(clip.stat().st_size for clip in self._clips.values())
        self.embedded = self.bytes <= EMBEDDED_BYTES
        self.folder = page.with_name(f"{page.stem}-files")

    def __len__(self) -> int:
        return len(self._clips)

    def source(self, clip: Path) -> str:
        """The URL of a clip, or an image, for the page: its content, or the path of its file."""
        if self.embedded:
            kind = KINDS[_suffix(clip)]
            return f"data:{kind};base64,{base64.b64encode(read_bytes(clip)).decode()}"
        folder = quote(self.folder.name, errors="surrogateescape")
        return f"{folder}/{self.digests[clip]}{_suffix(clip)}"

    def write(self) -> None:
        """Put the clips beside the page unless they are within it, as hard links if possible."""
        if self.embedded:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for digest, clip in self._clips.items():
            target = self.folder / f"{digest}{_suffix(clip)}"
            if not target.exists():
                link_or_copy(clip, target)

    def sweep(self) -> None:
        """Remove clips of an earlier page of this name that the new one does not show."""
        kept = set() if self.embedded else self._clips.keys()
        own = re.compile(f"([0-9a-f]{{{DIGEST}}})({'|'.join(map(re.escape, KINDS))})")
        for path in self.folder.glob("*"):
            if (match := own.fullmatch(path.name)) and match[1] not in kept:
                path.unlink()
