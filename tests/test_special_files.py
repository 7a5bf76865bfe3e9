"""What stands in place of a file or a folder that a user names: nothing, or a pipe, which would
keep its reader waiting."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from videorepa.artifacts.clips import CaptionedClip, MadeWith, claim, clips_of, readable_clips
from videorepa.artifacts.finished import read_finished
from videorepa.artifacts.model import Model
from videorepa.artifacts.reading import json_lines, json_object
from videorepa.artifacts.run import Run
from videorepa.artifacts.scores import earlier_rows
from videorepa.benchmarks.physics_iq import PhysicsIQ
from videorepa.compare import Reference
from videorepa.data.manifest import read_manifest, read_prompts
from videorepa.data.video import read_all, read_shape
from videorepa.encoders.headed import read_about
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.paired_clips import read_pairs
from videorepa.evaluation.ratings import Ratings
from videorepa.probe import read_names
from videorepa.probing.physion import PROTOCOLS
from videorepa.probing.records import Probe, Scan
from videorepa.recipe import Recipe
from videorepa.system.files import file_digest
from videorepa.system.fingerprint import file_sample_digest
from videorepa.system.hub import local_copy

MADE_WITH = MadeWith(
    model="m", fps=8, frames=1, height=8, width=8, steps=1, guidance_scale=1
)  # fmt: skip

# By the name that the file must have.
READERS: list[tuple[str, Callable[[Path], object]]] = [
    ("clips.csv", read_manifest),
    ("clips.jsonl", read_manifest),
    ("prompts.txt", read_prompts),
    ("clips.csv", readable_clips),
    ("clip.mp4", read_all),
    ("clip.mp4", read_shape),
    ("recipe.yaml", Recipe.from_yaml),
    ("a-0.json", CaptionedClip.read),
    ("generation.json", lambda path: claim(path.parent, MADE_WITH, [])),
    ("scores.jsonl", lambda path: list(earlier_rows(path.parent))),
    ("part.json", lambda path: read_finished(path, {}, lambda found: found)),
    ("any.json", json_object),
    ("any.jsonl", json_lines),
    ("ratings.json", Ratings.read),
    ("reference.json", Reference.read),
    ("names.txt", read_names),
    ("head.safetensors", read_about),
    ("weights", lambda path: local_copy(str(path))),
    ("any", file_digest),
    ("any", file_sample_digest),
    ("descriptions.csv", lambda path: PhysicsIQ(data=path.parent).scenario("a")),
    ("pairs.csv", read_pairs),
]


# What reads a folder that users name.
FOLDERS: list[Callable[[Path], object]] = [
    clips_of,
    readable_clips,
    Model.of,
    Run.open,
    Scan.read,
    Probe.read,
    PROTOCOLS["v1.5"].read,
    lambda path: PhysicsIQ(data=path).prompts(1, 0),
    lambda path: read_manifest(path.parent / "clips.csv", path),
]


@pytest.mark.parametrize("read", FOLDERS)
def test_a_missing_folder_is_said_to_be_missing(
    tmp_path: Path, read: Callable[[Path], object]
) -> None:
    (tmp_path / "clips.csv").write_text("video,caption\na.mp4,x\n")
    with pytest.raises(UserError, match="nowhere (does not exist|is not a run: it does not exist)"):
        read(tmp_path / "nowhere")


def test_a_file_in_a_missing_folder_is_said_to_lack_both(tmp_path: Path) -> None:
    path = tmp_path / "nowhere" / "clip.mp4"
    with pytest.raises(ClipError, match="does not exist, nor does the folder .*nowhere"):
        read_all(path)
    with pytest.raises(UserError, match="does not exist, nor does the folder .*nowhere"):
        read_manifest(path.with_suffix(".csv"))


@pytest.fixture(autouse=True)
def alarm() -> Iterator[None]:
    def ring(*arguments: object) -> None:
        raise TimeoutError("it waits for the pipe's other end")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("name", "read"), READERS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(READERS)]
)
def test_a_pipe_is_refused(tmp_path: Path, name: str, read: Callable[[Path], object]) -> None:
    os.mkfifo(tmp_path / name)
    says = "is a pipe, a socket or a device|is not a folder"
    with pytest.raises((UserError, ClipError, OSError), match=says):
        read(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "read"), READERS, ids=[f"{n}-{name}" for n, (name, _) in enumerate(READERS)]
)
def test_bytes_that_are_no_text_end_in_no_traceback(
    tmp_path: Path, name: str, read: Callable[[Path], object]
) -> None:
    (tmp_path / name).write_bytes(b"\xff\xfe\xff\n\xff\xff")
    with suppress(UserError, ClipError):
        read(tmp_path / name)
