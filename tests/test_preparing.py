"""Preparing: clips are read ahead and written behind, and nothing else changes by that."""

from __future__ import annotations

import errno
import importlib
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tree, write_clips
from videorepa.backbones import Backbone, BackboneSpec
from videorepa.data.cache import Cache
from videorepa.data.loader import PreparedClips
from videorepa.data.source import ManifestSource, SourceClip
from videorepa.data.video import to_video
from videorepa.errors import ClipError
from videorepa.recipe import Recipe
from videorepa.system import background

module = importlib.import_module("videorepa.prepare")
prepare = module.prepare


def in_turns(work: Callable[[Any], Any], items: Iterable[Any], *_: int, **__: int) -> Iterator[Any]:
    """Reading as it was: in the caller's thread, when it is wanted."""
    yield from map(work, items)


@contextmanager
def at_once(most: int) -> Iterator[Callable[..., None]]:
    """Writing as it was: in the caller's thread."""
    yield lambda function, *arguments: function(*arguments)


@pytest.fixture
def own(recipe: Recipe, tmp_path: Path) -> Recipe:
    """Chunks of 2, 2, 2 and 1; the fourth clip cannot be read."""
    manifest = write_clips(tmp_path / "own", count=7)
    manifest.with_name("clip3.mp4").write_bytes(b"no video")
    return recipe.override(f"data.manifest={manifest}", "data.prepare_batch=2")


def test_the_cache_is_that_of_one_thread_to_the_last_bit(
    own: Recipe, tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(module, "READERS", 3)
    done = prepare(own)
    assert (done.made, done.complete, list(done.failed)) == (6, 0, ["clip3.mp4"])
    plain = own.override(f"data.cache={tmp_path / 'plain'}")
    monkeypatch.setattr(module, "ahead", in_turns)
    monkeypatch.setattr(module, "behind", at_once)
    assert prepare(plain) == done
    made = tree(own.data.cache)
    assert made == tree(plain.data.cache)
    assert sum(name.startswith("clips/") for name in made) == 6
    assert sum(name.startswith("failures/") for name in made) == 1


def test_frames_become_the_numbers_that_a_cpu_gives() -> None:
    frames = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
    expected = torch.from_numpy(frames).movedim(-1, -3).float() / 255.0
    video = to_video(torch.from_numpy(frames))
    assert torch.equal(video, to_video(frames))
    assert torch.equal(video, expected) and video.stride() == expected.stride()


def test_clips_are_read_and_written_while_others_are_encoded(own: Recipe, monkeypatch) -> None:
    """The second chunk is encoded only when the third has been read and the first is written."""
    events = {name: threading.Event() for name in ("third chunk is read", "first is written")}
    sample, write, encode = ManifestSource.sample, Cache.write_clip, Backbone.encode_video
    encoded: list[int] = []

    def sampled(self: ManifestSource, index: int) -> Any:
        if index == 5:
            events["third chunk is read"].set()
        return sample(self, index)

    def written(self: Cache, *arguments: Any) -> None:
        write(self, *arguments)
        assert threading.current_thread() is not threading.main_thread()
        events["first is written"].set()

    def encoding(self: Backbone, video: torch.Tensor) -> torch.Tensor:
        encoded.append(len(video))
        if len(encoded) == 2:
            for name, event in events.items():
                assert event.wait(10), name
        return encode(self, video)

    monkeypatch.setattr(ManifestSource, "sample", sampled)
    monkeypatch.setattr(Cache, "write_clip", written)
    monkeypatch.setattr(Backbone, "encode_video", encoding)
    assert prepare(own).made == 6
    assert encoded == [2, 1, 2, 1]


def test_a_full_disk_ends_it_and_the_same_call_goes_on(
    own: Recipe, tmp_path: Path, monkeypatch
) -> None:
    write, written = Cache.write_clip, []

    def until_full(self: Cache, record: Any, *arguments: Any) -> None:
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(self.root))
        write(self, record, *arguments)
        written.append(record.id)

    monkeypatch.setattr(Cache, "write_clip", until_full)
    with pytest.raises(OSError, match="No space left"):
        prepare(own)
    assert written == ["clip0.mp4", "clip1.mp4"]
    monkeypatch.setattr(Cache, "write_clip", write)
    done = prepare(own)
    assert (done.complete, done.made, list(done.failed)) == (2, 4, ["clip3.mp4"])
    whole = own.override(f"data.cache={tmp_path / 'whole'}")
    prepare(whole)
    assert tree(own.data.cache) == tree(whole.data.cache)


@pytest.mark.parametrize("stopped", [KeyboardInterrupt, RuntimeError])
def test_it_can_be_stopped_while_a_video_hangs(own: Recipe, monkeypatch, stopped: type) -> None:
    monkeypatch.setattr(background, "PATIENCE", 0.05)
    sample, hanging = ManifestSource.sample, threading.Event()

    def hangs(self: ManifestSource, index: int) -> Any:
        if index == 4:
            hanging.wait()
        return sample(self, index)

    def interrupted(self: Backbone, video: torch.Tensor) -> torch.Tensor:
        raise stopped("stopped")

    monkeypatch.setattr(ManifestSource, "sample", hangs)
    monkeypatch.setattr(Backbone, "encode_video", interrupted)
    begun = time.monotonic()
    with pytest.raises(stopped, match="stopped"):
        prepare(own)
    hanging.set()
    assert time.monotonic() - begun < 20


def test_an_error_of_a_reader_is_no_clips_fault(own: Recipe, monkeypatch) -> None:
    def breaks(self: ManifestSource, index: int) -> Any:
        raise RuntimeError("the reader breaks")

    monkeypatch.setattr(ManifestSource, "sample", breaks)
    with pytest.raises(RuntimeError, match="the reader breaks"):
        prepare(own)
    assert not list(Cache(own).failures.iterdir())


def test_videos_that_are_away_cost_no_clip_that_is_complete(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "own"
    manifest = write_clips(folder, count=3)
    own = recipe.override(f"data.manifest={manifest}", "data.prepare_batch=3")
    assert prepare(own).made == 3
    before = PreparedClips(own, shown=False).contents
    cache = Cache(own)
    # Left by a version that took absent videos for failed clips.
    cache.note_failure(SourceClip("clip2.mp4", ""), "the video cannot be read")
    folder.rename(away := tmp_path / "away")
    folder.mkdir()
    (away / manifest.name).rename(manifest)
    done = prepare(own)
    assert (done.made, done.complete, done.failed) == (0, 3, {})
    assert PreparedClips(own, shown=False).contents == before

    # One that lacks something does fail, and a complete one in its chunk still does not.
    cache._file(cache.clips, SourceClip("clip1.mp4", "")).unlink()
    done = prepare(own)
    assert (done.made, done.complete, list(done.failed)) == (0, 2, ["clip1.mp4"])
    for video in away.glob("*.mp4"):
        video.rename(folder / video.name)
    done = prepare(own)
    assert (done.made, done.complete, done.failed) == (1, 2, {})


def test_a_video_that_goes_while_others_are_made_costs_no_complete_clip(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    own = recipe.override(f"data.manifest={write_clips(tmp_path / 'own', count=3)}")
    prepare(own)
    cache = Cache(own)
    cache._file(cache.clips, SourceClip("clip1.mp4", "")).unlink()

    def gone(self: ManifestSource, index: int) -> Any:
        raise ClipError("the video cannot be read")

    with monkeypatch.context() as patch:
        patch.setattr(ManifestSource, "sample", gone)
        done = prepare(own)
    assert (done.made, done.complete, list(done.failed)) == (0, 2, ["clip1.mp4"])


def test_a_kept_caption_is_made_again_where_its_text_encoder_saw_another_video(
    recipe: Recipe, tmp_path: Path, monkeypatch
) -> None:
    def seeing(self: Backbone, captions: Any, images: torch.Tensor) -> dict[str, torch.Tensor]:
        texts = self.encode_text(captions)
        return {name: text + images.mean((1, 2, 3))[:, None, None] for name, text in texts.items()}

    monkeypatch.setattr(BackboneSpec, "text_sees_image", property(lambda self: True))
    monkeypatch.setattr(Backbone, "encode_text_of", seeing)
    manifest = write_clips(tmp_path / "own", count=2)
    own = recipe.override(f"data.manifest={manifest}")

    def stops(self: Backbone, video: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Backbone, "encode_video", stops)
        prepare(own)
    assert len(list(Cache(own).captions.iterdir())) == 2
    manifest.with_name("clip1.mp4").replace(manifest.with_name("clip0.mp4"))
    write_clips(tmp_path / "again", count=2)
    (tmp_path / "again" / "clip1.mp4").replace(manifest.with_name("clip1.mp4"))
    fresh = own.override(f"data.cache={tmp_path / 'fresh'}")
    prepare(own), prepare(fresh)
    clips = [tree(each.data.cache / "clips") for each in (own, fresh)]
    assert clips[0] == clips[1] and len(clips[0]) == 2
