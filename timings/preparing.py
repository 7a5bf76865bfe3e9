"""How many clips a second `prepare` makes, beside the published way, and what it waits for.

Run: python timings/preparing.py            three cases in three ways, some minutes on 2 cores
     python timings/preparing.py --case large --device-seconds 0.2

The ways: "published" takes one clip after the other in the main process, as the published code
does, here with this project's functions: read it, convert it to float, run the teacher, the
autoencoder and the text encoder, and write. "in turns" is `prepare` without anything in the
background: all captions first, then chunks that are read, encoded and written one after the other.
"prepare" is `prepare`.

The cases: "micro" are simulated clips of 17 frames of 64 x 64 with the micro models on the CPU,
"scaled" the same clips cut from videos of 49 frames of 480 x 720, and "large" whole clips of that
size. For these the models are stand-ins that keep nothing busy and answer after --device-seconds a
clip, as if they were on a GPU: on a CPU the autoencoder alone takes all of the time, the micro one
25 s a clip. Conversion to float is then free for `prepare`, which leaves it to the device.

Each way runs in a process of its own, in turns; the table shows the fastest of the repeats. Loading
the models does not count.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest import mock

# Idle threads that spin slow a busy machine fivefold. Set before anything starts them.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch
from torch.nn import functional as F

from videorepa.data.cache import Cache, Record
from videorepa.data.simulated import simulate_clips
from videorepa.data.source import open_source
from videorepa.data.video import to_video, write_video
from videorepa.recipe import Recipe
from videorepa.system.device import compute_dtype
from videorepa.tokens import TokenGrid

WAYS = ("published", "in turns", "prepare")

CASES = {"micro": (96, 16), "scaled": (48, 16), "large": (24, 1)}
"""Clips, and clips that are encoded at once."""

FEW = 2
"""Clips that are prepared before the clock starts, which imports the libraries."""

module = import_module("videorepa.prepare")


def make_clips(folder: Path, case: str) -> None:
    """Write a case's videos, and a manifest of them all and one of the first few."""
    count = CASES[case][0]
    if case == "micro":
        simulate_clips(folder, count)
    else:
        make_large_clips(folder, count)
    lines = (folder / "clips.csv").read_text().splitlines(keepends=True)
    (folder / "few.csv").write_text("".join(lines[: 1 + FEW]))


def make_large_clips(folder: Path, count: int) -> None:
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    noise = 255 * torch.rand(1, 3, 64, 108, generator=draw)
    scenery = F.interpolate(noise, (488, 824), mode="bicubic").clamp(0, 255).byte()[0]
    pixels = scenery.movedim(0, -1).numpy()
    lines = ["video,caption"]
    for number in range(count):
        row = number % 8
        frames = [pixels[row : row + 480, 2 * t : 2 * t + 720] for t in range(49)]
        write_video(folder / f"{number}.mp4", np.stack(frames), 24)
        lines.append(f"{number}.mp4,Clip {number} moves over a scenery.")
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")


def recipe_for(manifest: Path, case: str, cache: Path) -> Recipe:
    frames, height, width = (49, 480, 720) if case == "large" else (17, 64, 64)
    data = {"frames": frames, "height": height, "width": width, "cache": str(cache)}
    data |= {"manifest": str(manifest), "prepare_batch": CASES[case][1]}
    return Recipe.parse(
        {
            "name": "timing",
            "backbone": {"name": "cogvideox", "weights": "micro"},
            "encoder": {"name": "videomae", "weights": "micro", "frames": 16, "height": 64}
            | {"width": 64},
            "align": {"block": 4},
            "data": data,
            "optim": {"steps": 1, "batch_size": 1, "learning_rate": 1e-4},
        }
    )


class OnADevice:
    """Stands for a backbone and a teacher that take a device's time and none of the CPU's."""

    def __init__(self, recipe: Recipe, seconds: float) -> None:
        self.seconds = seconds
        self.moments = recipe.backbone.moments(recipe.data)
        assert recipe.encoder is not None
        self.grid = recipe.encoder.shape(recipe.data.frames)
        self.text = recipe.backbone.text()

    def __call__(self, video: torch.Tensor) -> TokenGrid:
        tokens = torch.zeros(len(video), *self.grid.tokens.shape[1:])
        return TokenGrid(tokens, self.grid.start, self.grid.stride)

    def encode_video(self, video: torch.Tensor) -> torch.Tensor:
        time.sleep(self.seconds * len(video))
        return torch.zeros(len(video), *self.moments)

    def encode_text(self, captions: list[str]) -> dict[str, torch.Tensor]:
        return {
            name: torch.zeros(len(captions), *like.shape, dtype=like.dtype)
            for name, like in self.text.items()
        }

    def count_tokens(self, captions: list[str]) -> list[int]:
        return [1] * len(captions)


class Clock:
    """Sums up the seconds of what it times."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextmanager
    def running(self) -> Iterator[None]:
        begun = time.monotonic()
        try:
            yield
        finally:
            self.seconds += time.monotonic() - begun

    def timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            with self.running():
                return function(*arguments, **options)

        return call

    def waited(self, results: Iterable[Any]) -> Iterator[Any]:
        iterator = iter(results)
        try:
            while True:
                with self.running():
                    try:
                        result = next(iterator)
                    except StopIteration:
                        return
                yield result
        finally:
            iterator.close()  # pyright: ignore[reportAttributeAccessIssue]


def published(recipe: Recipe, loading: Clock, reading: Clock, encoding: Clock) -> None:
    """One clip at a time, in the main process."""
    source, device = open_source(recipe.data), torch.device("cpu")
    dtype = compute_dtype(recipe.train.precision, device)
    cache = Cache(recipe, encoded_in=dtype)
    with loading.running():
        backbone = recipe.backbone.load(("vae", "text_encoder"), device, dtype)
        assert recipe.encoder is not None
        encoder = recipe.encoder.load(device, dtype)
    cache.write_empty_caption({k: v[0] for k, v in backbone.encode_text([""]).items()})
    for number, clip in enumerate(source.items):
        with reading.running():
            sampled = source.sample(number)
            video = to_video(sampled.frames[None])
        digest = source.digest(number)
        with encoding.running():
            grid, latents = encoder(video), backbone.encode_video(video)
            texts, tokens = (
                backbone.encode_text([clip.caption]),
                backbone.count_tokens([clip.caption]),
            )
        cache.write_features(clip, digest, recipe.encoder, grid)
        text = {name: value[0] for name, value in texts.items()}
        record = Record(clip.id, clip.caption, digest, tokens[0], sampled.sampling)
        cache.write_clip(record, latents[0], text)


def in_turns(work: Callable[[Any], Any], items: Iterable[Any], *_: int, **__: int) -> Iterator[Any]:
    yield from (work(item) for item in items)


@contextmanager
def at_once(most: int) -> Iterator[Callable[..., None]]:
    yield lambda function, *arguments: function(*arguments)


def measure(case: str, way: str, folder: Path, device_seconds: float) -> dict[str, float]:
    """Seconds a clip, and the shares of them in which encoders waited for videos and worked."""
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as changes:
        few, recipe = (
            recipe_for(folder / f"{which}.csv", case, Path(scratch) / which)
            for which in ("few", "clips")
        )
        loading, reading, encoding = Clock(), Clock(), Clock()
        if case == "large":
            stand_in = OnADevice(recipe, device_seconds)
            for described in (type(recipe.backbone), type(recipe.encoder)):
                load = mock.patch.object(described, "load", lambda *_, **__: stand_in)
                changes.enter_context(load)
            free = lambda frames: torch.empty(frames.shape, device="meta")  # noqa: E731
            changes.enter_context(mock.patch.object(module, "to_video", free))
        if way == "published":
            published(few, Clock(), Clock(), Clock())
            begun = time.monotonic()
            published(recipe, loading, reading, encoding)
        else:
            module.prepare(few, device="cpu")
            if way == "in turns":
                changes.enter_context(mock.patch.object(module, "ahead", in_turns))
                changes.enter_context(mock.patch.object(module, "behind", at_once))
            for described in (type(recipe.backbone), type(recipe.encoder)):
                timed = mock.patch.object(described, "load", loading.timed(described.load))
                changes.enter_context(timed)
            encode = mock.patch.object(module, "_encode", encoding.timed(module._encode))
            changes.enter_context(encode)
            real = module._read
            waiting = mock.patch.object(
                module, "_read", lambda *given: reading.waited(real(*given))
            )
            changes.enter_context(waiting)
            begun = time.monotonic()
            done = module.prepare(recipe, device="cpu")
            assert done.made == CASES[case][0] and not done.failed
        seconds = time.monotonic() - begun - loading.seconds
        return {
            "clip": seconds / CASES[case][0],
            "waited": reading.seconds / seconds,
            "encoding": encoding.seconds / seconds,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--device-seconds", type=float, default=0.3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--child", nargs=2, metavar=("WAY", "FOLDER"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child is not None:
        way, folder = given.child
        print(json.dumps(measure(given.case[0], way, Path(folder), given.device_seconds)))
        return
    print(
        "| case | way | clips a second | times published (all repeats) | waited for videos "
        "| encoders at work |"
    )
    print("|---|---|---|---|---|---|")
    for case in given.case or CASES:
        with tempfile.TemporaryDirectory() as scratch:
            make_clips(Path(scratch) / "clips", case)
            rows: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(given.repeats):
                for way in WAYS:
                    child = ["--child", way, str(Path(scratch) / "clips"), "--case", case]
                    device = ["--device-seconds", str(given.device_seconds)]
                    done = subprocess.run(
                        [sys.executable, __file__, *child, *device],
                        stdout=subprocess.PIPE,
                        stderr=subprocess.DEVNULL,
                        text=True,
                        check=True,
                    )
                    rows[way].append(json.loads(done.stdout.splitlines()[-1]))
        plain = [row["clip"] for row in rows["published"]]
        for way, each in rows.items():
            best = min(each, key=lambda row: row["clip"])
            ratios = sorted(p / row["clip"] for p, row in zip(plain, each, strict=True))
            spread = f"{min(plain) / best['clip']:.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            print(
                f"| {case} | {way} | {1 / best['clip']:.2f} | {spread} | {best['waited']:.0%} "
                f"| {best['encoding']:.0%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
