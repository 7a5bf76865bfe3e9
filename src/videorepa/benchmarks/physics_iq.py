"""Physics-IQ (Motamed et al. 2025, arXiv 2501.09038): filmed experiments, continued by a model.

Each experiment was filmed twice from each of three views. A clip is compared with the first take;
how alike the two takes are is how well a clip could do. It is for models that are given the last
frame before the test, or the three seconds before it: a text-to-video model cannot take it.
"""

from __future__ import annotations

import csv
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, UInt8
from torch.nn import functional as F

from videorepa.artifacts.scores import Row
from videorepa.benchmarks import Benchmark
from videorepa.data.manifest import Prompt
from videorepa.data.video import iterate, read_all
from videorepa.errors import ClipError, UserError
from videorepa.evaluation.pairs import Pairs
from videorepa.evaluation.statistics import bootstrap, swap

SECONDS = 5.0

TOLERANCE = 0.001

FILMED_FPS = 30

SHRUNK = 4
"""Everything is compared at a quarter of the filmed height and width."""

MOVED = 10.0
"""Grey levels from the running mean beyond which a pixel moves."""

KEPT = 0.7
"""Of the running mean, at each frame."""

METRICS = ("mse", "spatiotemporal_iou", "spatial_iou", "weighted_spatial_iou")

_GENERATED = re.compile(r"(?P<id>\d+)_(?P<view>[^_]+)_trimmed-(?P<name>.+)")

_REAL = re.compile(
    r"(?P<id>\d+)_[^_]+_(?P<fps>\d+)FPS_(?P<view>[^_]+)_(?P<take>take-[12])_trimmed-(?P<name>.+)"
)


class Take(NamedTuple):
    """A video and where something moves in it, at the size that is compared."""

    frames: UInt8[np.ndarray, "f h w 3"]
    moving: Bool[np.ndarray, "f h w"]


# The four metrics.


def compared(a: Take, b: Take) -> dict[str, float]:
    """The published metrics of two videos of the same frames and size.

    mse: mean square difference of pixels, 0 to 1. spatiotemporal_iou: of what moves, frame by
    frame. spatial_iou: of what ever moves. weighted_spatial_iou: of how often each pixel moves,
    sum of the lesser over sum of the greater. An IoU is 1 where nothing moves in either.
    """
    square = ((x / 255.0 - y / 255.0) ** 2 for x, y in zip(a.frames, b.frames, strict=True))
    by_frame = [_iou(x, y) for x, y in zip(a.moving, b.moving, strict=True)]
    often_a, often_b = a.moving.mean(0), b.moving.mean(0)
    return {
        "mse": float(np.mean([frame.mean() for frame in square])),
        "spatiotemporal_iou": float(np.mean(by_frame)),
        "spatial_iou": _iou(a.moving.max(0), b.moving.max(0)),
        "weighted_spatial_iou": _iou(often_a, often_b),
    }


def _iou(a: np.ndarray, b: np.ndarray) -> float:
    either = np.maximum(a, b).sum()
    return float(np.minimum(a, b).sum() / either) if either else 1.0


def score(found: Float[np.ndarray, "... 4"], takes: Float[np.ndarray, "... 4"]) -> np.ndarray:
    """The Physics-IQ score, 0 to 100, of the metrics' means over scenarios, in METRICS' order.

    takes: the same of the first take and the second. An IoU counts as a share of what a second
    take reaches; the MSE by how much it exceeds a second take's.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = found[..., 1:] / takes[..., 1:]
    return 100.0 * np.clip(shares.mean(-1) - (found[..., 0] - takes[..., 0]), 0.0, 1.0)


# What moves.


def moving(frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Iterator[UInt8[np.ndarray, "h w"]]:
    """0 or 255 for each pixel of each frame: how far its grey is from the running mean, which this
    frame is already part of. Nothing moves in the first frame. Specks and pinholes are closed, by
    opening and then closing with a square of 5 pixels."""
    mean = None
    for frame in frames:
        grey = _blurred(_grey(frame))
        if mean is None:
            mean = grey
            yield np.zeros(grey.shape, np.uint8)
            continue
        mean = KEPT * mean + (1 - KEPT) * grey
        moved = ((grey - mean).abs() > MOVED).float()
        yield (_closed(-_closed(-moved)) * 255).to(torch.uint8).numpy()


def _grey(frame: UInt8[np.ndarray, "h w 3"]) -> torch.Tensor:
    """ITU-R 601 luma in whole numbers, with OpenCV's weights of 15 bits."""
    weights = torch.tensor([9798, 19235, 3735])
    return ((torch.from_numpy(frame).int() * weights).sum(-1) + (1 << 14)) >> 15


def _blurred(grey: torch.Tensor) -> torch.Tensor:
    """By OpenCV's Gaussian of 5 pixels, mirrored at the edges, in whole numbers."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    padded = F.pad(grey[None, None].float(), (2, 2, 2, 2), mode="reflect")
    sums = F.conv2d(padded, torch.outer(kernel, kernel)[None, None])[0, 0]
    return (sums / 256 + 0.5).floor()


def _closed(mask: torch.Tensor) -> torch.Tensor:
    """Dilated, then eroded. Of what is turned over it is the opening, turned over."""
    grown = F.max_pool2d(mask[None], 5, stride=1, padding=2)
    return -F.max_pool2d(-grown, 5, stride=1, padding=2)[0]


def resized(pixels: UInt8[np.ndarray, "h w *c"], height: int, width: int) -> np.ndarray:
    """Bilinear without antialias, whatever the aspect, in whole numbers: OpenCV's default."""
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).float().reshape(*pixels.shape[:2], -1)
    planes = F.interpolate(planes.permute(2, 0, 1)[None], (height, width), mode="bilinear")[0]
    whole = (planes + 0.5).floor().to(torch.uint8).permute(1, 2, 0).numpy()
    return whole.reshape(height, width, *pixels.shape[2:])


def at_rate(frames: Iterable[np.ndarray], rate: float, count: int) -> Iterator[np.ndarray]:
    """`count` frames of a video filmed at 30 a second, at another rate, each blended linearly from
    the two beside it in time; past the end the last stands."""
    step, number = FILMED_FPS / rate, 0
    before = after = None
    for place, frame in enumerate(frames):
        before, after = after, frame.astype(np.float32)
        while number < count and number * step <= place:
            share = place - number * step
            blend = after if before is None else share * before + (1 - share) * after
            yield (blend + 0.5).astype(np.uint8)
            number += 1
    if after is None:
        raise ClipError("the video holds no frame")
    for _ in range(number, count):
        yield after.astype(np.uint8)


# The benchmark.


class PhysicsIQ(Benchmark):
    """data: the folder that Physics-IQ's files were downloaded to. Used are the test videos,
    split-videos/testing/30FPS/*.mp4 and those of other rates if they are there; masks in
    video-masks/real, which are made anew where there is none; and descriptions.csv.

    Videos are named as it wants them, {id}_{view}_trimmed-{name}.mp4, and last 5 seconds.
    """

    name: Literal["physics_iq"] = "physics_iq"
    version: ClassVar[str] = "1"
    data: Path

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        found = []
        for path in sorted(videos.glob("*.mp4")):
            match = _GENERATED.fullmatch(path.stem)
            if match is None:
                raise UserError(
                    f"{path} is not named as Physics-IQ wants it: "
                    "0001_perspective-left_trimmed-a-name.mp4, say. Rename it or take it away."
                )
            name = f"{match['view']}_{match['name']}"
            found.append((path, {"prompt_id": name, "caption": name, "k": 0}))
        return found

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """The first `count` views of experiments; the same for every seed."""
        names = sorted(
            {f"{view}_{name}" for _, view, take, name in self._videos if take[-1] == "1"}
        )
        return [Prompt(name, name) for name in names][:count]

    def missing(self, prompts: Collection[str]) -> list[Prompt]:
        return [p for p in self.prompts(len(self._videos), 0) if p.caption not in prompts]

    def scenario(self, prompt: str) -> str | None:
        """The experiment's category, where descriptions.csv is there."""
        return self._categories.get(prompt)

    def read(self, video: Path) -> np.ndarray:
        frames, fps = read_all(video)
        if abs(len(frames) / fps - SECONDS) > TOLERANCE:
            raise ClipError(
                f"{video} lasts {len(frames) / fps:.3f} s; expected {SECONDS:g} s: cut it to "
                f"{SECONDS * fps:g} frames"
            )
        return frames

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """The four metrics against the first take; as NAME_takes, those of the first take against
        the second; and as NAME_static, those of a video in which the first frame stands still."""
        view, _, name = prompt.partition("_")
        first, second = (self._take(view, f"take-{n}", name, len(frames)) for n in (1, 2))
        height, width = first.frames.shape[1:3]
        mask = [resized(m, height, width) > 127 for m in moving(frames)]
        shown = np.stack([resized(frame, height, width) for frame in frames])
        still = Take(first.frames[:1].repeat(len(frames), 0), np.zeros_like(first.moving))
        return (
            compared(Take(shown, np.stack(mask)), first)
            | {f"{key}_takes": value for key, value in compared(first, second).items()}
            | {f"{key}_static": value for key, value in compared(still, first).items()}
        )

    def aggregate(self, rows: list[Row]) -> dict[str, dict[str, Any]]:
        """score, and static_score of standing still, in percent, with their bootstrap over
        experiments; and the means that they follow from. n: experiments."""
        values = _by_experiment(rows)
        found: dict[str, dict[str, Any]] = {}
        for name, columns in (("score", slice(0, 4)), ("static_score", slice(8, 12))):

            def scored(means: np.ndarray, columns: slice = columns) -> np.ndarray:
                return score(means[..., columns], means[..., 4:8])

            low, high = bootstrap(values, scored)
            percent = float(scored(values.mean(0)))
            found[name] = {"percent": percent, "low": low, "high": high, "n": len(values)}
        for place, key in enumerate(_keys()):
            found[key] = {"mean": float(values[:, place].mean()), "n": len(values)}
        return found

    def compare(self, rows_a: list[Row], rows_b: list[Row]) -> dict[str, Any]:
        """B's score minus A's, with its bootstrap over experiments, and p by exchanging the two in
        experiments drawn at random."""
        paired = Pairs.of(rows_a, rows_b)
        a, b = (_by_experiment([pair[side] for pair in paired.pairs]) for side in (0, 1))

        def difference(means: np.ndarray) -> np.ndarray:
            ours, theirs = means[..., 12:], means[..., :12]
            return score(ours[..., :4], ours[..., 4:8]) - score(theirs[..., :4], theirs[..., 4:8])

        both = np.concatenate([a, b], 1)
        low, high = bootstrap(both, difference)
        return {
            "score": {
                "difference": float(difference(both.mean(0))),
                "low": low,
                "high": high,
                "n": len(both),
                "p": swap(a, b, lambda x, y: difference(np.concatenate([x, y], -1))),
            },
            "unpaired": paired.unpaired,
        }

    def _take(self, view: str, take: str, name: str, count: int) -> Take:
        """A filmed take at the rate that gives so many frames."""
        rate = count / SECONDS
        exact = (f"{rate:g}", view, take, name)
        path = self._videos.get(exact) or self._videos.get((str(FILMED_FPS), view, take, name))
        if path is None:
            raise UserError(
                f"{self.data} has no video of {view}_{name}, {take}, at {FILMED_FPS} frames a "
                "second; expected Physics-IQ's split-videos/testing."
            )

        def frames() -> Iterator[np.ndarray]:
            every = iterate(path)
            return islice(every, count) if exact in self._videos else at_rate(every, rate, count)

        def shrunk(pixels: np.ndarray) -> np.ndarray:
            return resized(pixels, pixels.shape[0] // SHRUNK, pixels.shape[1] // SHRUNK)

        if exact in self._masks:
            masks = (mask[..., 0] for mask in islice(iterate(self._masks[exact]), count))
        else:
            masks = moving(frames())
        shown = [shrunk(frame) for frame in frames()]
        moved = [shrunk(mask) > 127 for mask in masks]
        if not len(shown) == len(moved) == count:
            raise ClipError(
                f"{path} has {len(shown)} frames and its mask {len(moved)}; expected {count}"
            )
        return Take(np.stack(shown), np.stack(moved))

    @cached_property
    def _videos(self) -> dict[tuple[str, str, str, str], Path]:
        """By rate, view, take and name."""
        found = _named(self.data / "split-videos" / "testing")
        if not found:
            raise UserError(
                f"{self.data} holds no split-videos/testing/*FPS/*.mp4; expected the folder that "
                "Physics-IQ's files were downloaded to."
            )
        return found

    @cached_property
    def _masks(self) -> dict[tuple[str, str, str, str], Path]:
        return _named(self.data / "video-masks" / "real")

    @cached_property
    def _categories(self) -> dict[str, str]:
        path = self.data / "descriptions.csv"
        if not path.exists():
            return {}
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.DictReader(file))
        found = {}
        for row in rows:
            match = _GENERATED.fullmatch(Path(row.get("generated_video_name") or "").stem)
            if match and row.get("category"):
                found[f"{match['view']}_{match['name']}"] = row["category"]
        return found


def _named(folder: Path) -> dict[tuple[str, str, str, str], Path]:
    matches = ((path, _REAL.fullmatch(path.stem)) for path in sorted(folder.rglob("*.mp4")))
    return {(m["fps"], m["view"], m["take"], m["name"]): path for path, m in matches if m}


def _keys() -> list[str]:
    """Columns of `_by_experiment`: four metrics, of the takes, and of standing still."""
    return [f"{metric}{of}" for of in ("", "_takes", "_static") for metric in METRICS]


def _by_experiment(rows: Sequence[Row]) -> Float[np.ndarray, "n 12"]:
    """Means over the views of each experiment, which its three views are one of."""
    of: dict[str, list[list[float]]] = defaultdict(list)
    for row in rows:
        of[row["prompt_id"].partition("_")[2]].append([row[key] for key in _keys()])
    return np.array([np.mean(views, 0) for _, views in sorted(of.items())])
