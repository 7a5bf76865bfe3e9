"""What a verb leaves, in a form that is equal for an undisturbed run and one that went on."""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import re
import stat
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from videorepa.system.files import STALE_SECONDS


def _without_times(content: bytes) -> bytes:
    rows = [json.loads(line) for line in content.splitlines()]
    timing = ("step_seconds", "clips_per_second", "memory_gb")
    return json.dumps(
        [{k: v for k, v in row.items() if not k.startswith(timing)} for row in rows]
    ).encode()


def _without_commit(content: bytes) -> bytes:
    return re.sub(rb"\b[0-9a-f]{40}\b", b"", content)


def _without_plots_of_speed(content: bytes) -> bytes:
    page = _without_commit(content)
    return re.sub(
        rb"<figcaption><strong>(Speed|Use of the device)<.*?</figure>", b"", page, flags=re.S
    )


EXCLUDED: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "*scores/seconds.json": (lambda _: b"", "how long each clip's score took"),
    "*scan.json": (_without_commit, "the project's commit may move while the campaign runs"),
    "*probe.json": (_without_commit, "likewise"),
    "*verified.json": (_without_commit, "likewise"),
    "*environment.json": (_without_commit, "likewise"),
    "*.html": (_without_plots_of_speed, "likewise, and speed is measured"),
    "*digests.json": (lambda _: b"", "when files were written is remembered"),
    "*log.jsonl": (_without_times, "speed and memory of each step are measured"),
}
"""Whatever is not compared, for all verbs: which files, what is left of them, and why."""


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder with the digest of its content, but for what is excluded."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink() or not path.is_file():
            if not path.is_dir():
                found[name] = "special"
            continue
        data = path.read_bytes()
        for pattern, (rest, _) in EXCLUDED.items():
            if fnmatch.fnmatch(name, pattern):
                data = rest(data)
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def differences(ours: dict[str, str], theirs: dict[str, str]) -> list[str]:
    """In words: which files are missing, too many, or of other content."""
    words = [f"missing: {name}" for name in sorted(theirs.keys() - ours.keys())]
    words += [f"too many: {name}" for name in sorted(ours.keys() - theirs.keys())]
    both = sorted(ours.keys() & theirs.keys())
    return words + [f"differs: {name}" for name in both if ours[name] != theirs[name]]


def alike(words: str) -> str:
    """Words without random digits, so that alike faults count as one."""
    return re.sub(r"[0-9a-f]{8,}", "…", words)


def grow_old(folder: Path) -> None:
    """Make what a killed process has left look as it will an hour later, when it is swept."""
    long_ago = time.time() - STALE_SECONDS - 60
    for path in folder.rglob(".tmp-*"):
        os.utime(path, (long_ago, long_ago))


def snapshot(roots: Iterable[Path]) -> dict[str, tuple[int, ...]]:
    """Kind, size and time of the last change of everything below some folders; reads no content,
    and follows no link."""
    found = {}
    for root in roots:
        for folder, names, files in os.walk(root):
            for name in (*names, *files):
                path = os.path.join(folder, name)
                about = os.lstat(path)
                folder_like = stat.S_ISDIR(about.st_mode)
                found[path] = (
                    stat.S_IFMT(about.st_mode),
                    *(() if folder_like else (about.st_size, about.st_mtime_ns)),
                )
    return found
