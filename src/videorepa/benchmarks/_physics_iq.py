"""What Physics-IQ and Physics-IQ Verified share: files, masks, and the metrics of a clip.

Each experiment was filmed twice from each of three views. A clip is compared with the first take,
and the likeness of the two takes is what a clip's is measured by. The benchmarks are for models
that continue the last frame before the test, the switch frame, or the three seconds before it. A
text-to-video model cannot.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, UInt8
from torch.nn import functional as F

from videorepa.benchmarks import Benchmark, ClipForm
from videorepa.data.image import SAME_SHAPE, image_shape
from videorepa.data.manifest import IMAGE_SUFFIXES, Prompt, csv_rows
from videorepa.data.video import iterate, read_all, read_shape, resize
from videorepa.errors import ClipError, UserError
from videorepa.system.files import check_is_folder
from videorepa.system.fingerprint import file_sample_digest, json_digest
from videorepa.system.wording import count

SECONDS = 5.0
"""Duration of a clip, to half a frame: rates such as 29.97 have no whole number in it."""

FILMED_FPS = 30

SHRUNK = 4
"""Videos are compared at the filmed height and width over this."""

MOVED = 10.0
"""Distance from the running mean, in grey levels of 255, beyond which a pixel counts as moving."""

TAKEN = 0.3
"""Weight of each frame in the running mean."""

METRICS = ("mse", "spatiotemporal_iou", "spatial_iou", "weighted_spatial_iou")

VERIFIED = "physics-IQ-benchmark-verified"
"""The folder of Physics-IQ Verified's files. Those of the first version have the same names."""

_GENERATED = re.compile(r"(?P<id>\d+)_(?P<view>[^_]+)_trimmed-(?P<name>.+)")

_SWITCH = re.compile(r"\d+_switch-frames_[^_]+_(?P<view>[^_]+)_trimmed-(?P<name>.+)")

_NUMBERED = re.compile(r"(?P<id>\d+)(_.*)?")

_REAL = re.compile(
    r"(?P<id>\d+)_[^_]+_(?P<fps>\d+)FPS_(?P<view>[^_]+)_(?P<take>take-[12])_trimmed-(?P<name>.+)"
)


class Take(NamedTuple):
    """A video, and where something moves in it, at the size of the comparison."""

    frames: UInt8[np.ndarray, "f h w 3"]
    moving: Bool[np.ndarray, "f h w"]


# The four metrics.


def compared(a: Take, b: Take) -> dict[str, float]:
    """The published metrics of two videos with the same number of frames and the same size.

    An IoU of motion a and b is sum(min(a, b)) / sum(max(a, b)), or 1 if nothing moves in either.

    Returns:
        mse: mean squared difference of pixels in [0, 1].
        spatiotemporal_iou: IoU of the moving pixels of each frame, as a mean over frames.
        spatial_iou: IoU of the pixels that ever move.
        weighted_spatial_iou: IoU of the share of frames in which each pixel moves.
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


# Motion masks.


def moving(frames: Iterable[UInt8[np.ndarray, "h w 3"]]) -> Iterator[UInt8[np.ndarray, "h w"]]:
    """Mark where something moves: 0 or 255 for each pixel of each frame.

    A pixel moves if its grey is more than MOVED away from the running mean
    m = (1 - TAKEN) m + TAKEN grey, rounded to an integer, to which the frame itself contributes.
    Nothing moves in the first frame. Morphological opening and then closing with a square of 5
    pixels remove specks and pinholes.
    """
    mean = None
    for frame in frames:
        grey = _blurred(_grey(frame)).double()
        if mean is None:
            mean = grey
            yield np.zeros(grey.shape, np.uint8)
            continue
        mean = (1 - TAKEN) * mean + TAKEN * grey
        moved = ((grey - mean.round()).abs() > MOVED).float()
        yield (_closed(-_closed(-moved)) * 255).to(torch.uint8).numpy()


def _grey(frame: UInt8[np.ndarray, "h w 3"]) -> torch.Tensor:
    """ITU-R 601 luma in integers, with OpenCV's weights of 15 bits."""
    weights = torch.tensor([9798, 19235, 3735])
    return ((torch.from_numpy(frame).int() * weights).sum(-1) + (1 << 14)) >> 15


def _blurred(grey: torch.Tensor) -> torch.Tensor:
    """OpenCV's Gaussian blur of 5 pixels, mirrored at the edges, rounded to integers."""
    kernel = torch.tensor([1.0, 4.0, 6.0, 4.0, 1.0])
    padded = F.pad(grey[None, None].float(), (2, 2, 2, 2), mode="reflect")
    sums = F.conv2d(padded, torch.outer(kernel, kernel)[None, None])[0, 0]
    return (sums / 256 + 0.5).floor()


def _closed(mask: torch.Tensor) -> torch.Tensor:
    """Dilation and then erosion by a square of 5 pixels. `-_closed(-mask)` is the opening."""
    grown = F.max_pool2d(mask[None], 5, stride=1, padding=2)
    return -F.max_pool2d(-grown, 5, stride=1, padding=2)[0]


def resized(pixels: UInt8[np.ndarray, "h w *c"], height: int, width: int) -> np.ndarray:
    """Scale as OpenCV does by default: bilinear, without antialias, rounded to integers."""
    if pixels.shape[:2] == (height, width):
        return pixels
    planes = torch.from_numpy(np.ascontiguousarray(pixels)).float().reshape(*pixels.shape[:2], -1)
    planes = F.interpolate(planes.permute(2, 0, 1)[None], (height, width), mode="bilinear")[0]
    whole = (planes + 0.5).floor().to(torch.uint8).permute(1, 2, 0).numpy()
    return whole.reshape(height, width, *pixels.shape[2:])


def at_rate(frames: Iterable[np.ndarray], rate: float, count: int) -> Iterator[np.ndarray]:
    """Resample a video filmed at 30 frames per second.

    Each frame is a linear blend of the two filmed frames next to it in time. Past the end the last
    filmed frame is repeated.

    Args:
        frames: The video's frames.
        rate: Frames per second of the result.
        count: Number of frames of the result.

    Raises:
        ClipError: The video has no frame.
    """
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


class Filmed(Benchmark):
    """Continuations of filmed experiments, compared with what happened.

    The videos to score last 5 seconds and are named {id}_{view}_trimmed-{name}.mp4, or by the id
    of the first take's video alone, with or without more behind it: 0001.mp4, 0001_mine.mp4.

    Attributes:
        data: The folder that the benchmark's files were downloaded to. It reads the test videos in
            split-videos/testing, at 30FPS and at other rates if there are any, and the masks in
            video-masks/real. Clips are generated from switch-frames and the descriptions.
        makes_masks: Whether a mask that is not among the files is computed, or refused.
        describing: Where the descriptions are to be had, for messages.
        samples: How many clips of each prompt are generated.
    """

    data: Path
    makes_masks: ClassVar[bool] = True
    describing: ClassVar[str] = ""
    samples: ClassVar[int | None] = None

    def clips(self, videos: Path) -> list[tuple[Path, dict[str, Any]]]:
        clips: dict[str, Path] = {}
        for path in sorted(videos.glob("*.mp4")):
            name = self._named_by(path)
            if name in clips:
                raise UserError(
                    f"{clips[name]} and {path.name} are both clips of {name}. Take one away."
                )
            clips[name] = path
        return [
            (path, {"prompt_id": name, "caption": name, "k": 0}) for name, path in clips.items()
        ]

    def _named_by(self, clip: Path) -> str:
        """The view and the experiment that a clip's name stands for, a prompt's caption."""
        if match := _GENERATED.fullmatch(clip.stem):
            return f"{match['view']}_{match['name']}"
        match = _NUMBERED.fullmatch(clip.stem)
        names = self._first_takes.get(int(match["id"]), set()) if match else set()
        if len(names) != 1:
            videos = ", ".join(sorted(names)) or "no video"
            raise UserError(
                f"{clip} is not named as Physics-IQ expects, for example "
                "0001_perspective-left_trimmed-a-name.mp4"
                + (f"; its id stands for {videos} in {self.data}" if match else "")
                + ". Rename it or take it away."
            )
        return min(names)

    def prompts(self, count: int, seed: int) -> list[Prompt]:
        """The first `count` views of experiments, whatever the seed, each with its switch frame.

        Raises:
            UserError: One has no description or no switch frame, or that is of another shape than
                its film.
        """
        return [self._prompt(name) for name in self._names[:count]]

    def _prompt(self, name: str) -> Prompt:
        image, text = self._switch_frames.get(name), self._descriptions.get(name)
        if image is None:
            raise UserError(
                f"{self.root} has no switch frame of {name}; expected switch-frames/"
                f"NUMBER_switch-frames_anyFPS_{name.replace('_', '_trimmed-', 1)}.jpg."
            )
        if text is None:
            raise UserError(
                f"{self.described or self.root / 'descriptions.csv'} does not describe {name}. "
                f"{self.name} is generated from the published descriptions, with the columns "
                f"description and generated_video_name{self.describing}."
            )
        film, shape = self._film_of(name), image_shape(image)
        frame = read_shape(film)
        if abs(shape[1] * frame.height / (shape[0] * frame.width) - 1) > SAME_SHAPE:
            raise UserError(
                f"The switch frame {image} has {shape[0]}x{shape[1]} pixels, upright, and its film "
                f"{film.name} {frame.height}x{frame.width}, another shape. Download it again."
            )
        return Prompt(name, text, name, image=image)

    def missing(self, prompts: Collection[str]) -> list[Prompt]:
        return [Prompt(name, name) for name in self._names if name not in prompts]

    def form(self, fps: float) -> ClipForm:
        """Five seconds, from whole images. Its note counts films that have to be blended."""
        frames = round(SECONDS * fps)
        rate = f"{frames / SECONDS:g}"
        without = [
            name
            for name in self._names
            if (rate, *self._take_of(name)) not in self._masks
            or (rate, *self._take_of(name)) not in self._videos
        ]
        note = ""
        if without and not self.makes_masks:
            raise UserError(
                f"{self.root} has no film with its mask at {rate} frames a second of "
                f"{count(len(without), 'prompt')}, the first is {without[0]}. {self.name} scores "
                "clips at the rates of video-masks/real, published with 8, 16, 24 and 30: set "
                "generation.fps in the recipe to one that the model was trained at."
            )
        if without:
            note = (
                f"{self.root} lacks films or masks at {rate} frames a second of "
                f"{count(len(without), 'prompt')}: films are blended from {FILMED_FPS}, and masks "
                "made anew."
            )
        return ClipForm(frames, self.samples, whole_image=True, note=note)

    def filmed(self, prompt: str, frames: int, height: int, width: int) -> np.ndarray:
        """The first take, squeezed to the clip's shape."""
        film = self._film(*self._take_of(prompt), frames)
        return np.stack([resize(frame, height, width) for frame in film])

    def published_path(self, prompt: str, k: int) -> Path:
        number = self._film_of(prompt).stem.partition("_")[0]
        view, _, name = prompt.partition("_")
        return Path(f"run_{k + 1:02d}") / f"{number}_{view}_trimmed-{name}.mp4"

    def about_prompt(self, prompt: str) -> dict[str, Any]:
        """Its entry "takes" is a digest of the filmed takes, at all rates, and of their masks."""
        view, _, name = prompt.partition("_")
        filmed = {
            f"{kind} {take} {fps}": file_sample_digest(path)
            for kind, paths in (("video", self._videos), ("mask", self._masks))
            for (fps, of, take, experiment), path in paths.items()
            if (of, experiment) == (view, name)
        }
        return super().about_prompt(prompt) | {"takes": json_digest(filmed)}

    def scenario(self, prompt: str) -> str | None:
        """The experiment's category, if descriptions.csv names it."""
        return self._categories.get(prompt)

    def read(self, video: Path) -> np.ndarray:
        frames, fps = read_all(video)
        wanted = SECONDS * fps
        if abs(len(frames) - wanted) > 0.5:
            what = "cut it to" if len(frames) > wanted else "generate"
            raise ClipError(
                f"{video} lasts {len(frames) / fps:.3f} s; expected {SECONDS:g} s: {what} "
                f"{round(wanted)} frames at this rate"
            )
        return frames

    def score(self, frames: np.ndarray, prompt: str) -> dict[str, Any]:
        """Compare one clip with the filmed takes.

        Returns:
            The four metrics of the clip and the first take; as METRIC_takes, those of the two
            takes; and as METRIC_static, those of a video that repeats the first take's first
            frame and of the first take.
        """
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

    def _film(self, view: str, take: str, name: str, count: int) -> Iterator[np.ndarray]:
        """The frames of a filmed take, resampled to `count`."""
        rate = f"{count / SECONDS:g}"
        if path := self._videos.get((rate, view, take, name)):
            return islice(_filmed(path, count), count)
        return at_rate(
            _filmed(self._filmed_at_30(view, take, name), round(SECONDS * FILMED_FPS)),
            count / SECONDS,
            count,
        )

    def _filmed_at_30(self, view: str, take: str, name: str) -> Path:
        path = self._videos.get((str(FILMED_FPS), view, take, name))
        if path is None:
            raise UserError(
                f"{self.data} has no video of {view}_{name}, {take}, at {FILMED_FPS} frames a "
                "second; expected Physics-IQ's split-videos/testing."
            )
        return path

    def _take(self, view: str, take: str, name: str, count: int) -> Take:
        """A filmed take, resampled to `count` frames, and where something moves in it."""
        rate = count / SECONDS
        exact = (f"{rate:g}", view, take, name)
        path = self._videos.get(exact) or self._filmed_at_30(view, take, name)

        def shrunk(pixels: np.ndarray) -> np.ndarray:
            return resized(pixels, pixels.shape[0] // SHRUNK, pixels.shape[1] // SHRUNK)

        if exact in self._masks:
            masks = (mask[..., 0] for mask in islice(_filmed(self._masks[exact], count), count))
        elif not self.makes_masks:
            raise UserError(
                f"{self.root} has no mask of {view}_{name}, {take}, at {rate:g} frames a second, "
                f"and a mask made anew is not the refined one. {self.name} scores clips at a rate "
                "that video-masks/real has, 8, 16, 24 or 30."
            )
        else:
            masks = moving(self._film(view, take, name, count))
        shown = [shrunk(frame) for frame in self._film(view, take, name, count)]
        moved = [shrunk(mask) > 127 for mask in masks]
        if not len(shown) == len(moved) == count:
            raise ClipError(
                f"{path} has {len(shown)} frames and its mask {len(moved)}; expected {count}"
            )
        return Take(np.stack(shown), np.stack(moved))

    @property
    def root(self) -> Path:
        """The folder in which the benchmark's files lie. Raises UserError if there is none."""
        check_is_folder(self.data, "the folder of Physics-IQ's files")
        return self.data

    @property
    def described(self) -> Path | None:
        """A descriptions.csv, which names the experiments' categories, if there is one."""
        path = self.root / "descriptions.csv"
        return path if path.exists() else None

    @cached_property
    def _videos(self) -> dict[tuple[str, str, str, str], Path]:
        """Filmed videos by rate, view, take and name."""
        videos = _named(self.root / "split-videos" / "testing")
        if not videos:
            raise UserError(
                f"{self.data} holds no split-videos/testing/*FPS/*.mp4; expected the folder that "
                "Physics-IQ's files were downloaded to."
            )
        return videos

    @cached_property
    def _first_takes(self) -> dict[int, set[str]]:
        """The names of prompts by the ids of the videos that show their first take."""
        names: dict[int, set[str]] = defaultdict(set)
        for (_, view, take, name), path in self._videos.items():
            if take == "take-1":
                names[int(path.stem.partition("_")[0])].add(f"{view}_{name}")
        return names

    @cached_property
    def _names(self) -> list[str]:
        """The captions of prompts: a view and the name of an experiment."""
        return sorted(set().union(*self._first_takes.values()))

    def _take_of(self, prompt: str) -> tuple[str, str, str]:
        """The first take of a prompt, as `_videos` names it."""
        view, _, name = prompt.partition("_")
        return view, "take-1", name

    def _film_of(self, prompt: str) -> Path:
        """A file of the first take."""
        take = self._take_of(prompt)
        return next(path for (_, *of), path in self._videos.items() if tuple(of) == take)

    @cached_property
    def _switch_frames(self) -> dict[str, Path]:
        """The images that clips continue, by the captions of prompts."""
        paths = sorted((self.root / "switch-frames").glob("*"))
        images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
        matches = ((path, _SWITCH.fullmatch(path.stem)) for path in images)
        return {f"{m['view']}_{m['name']}": path for path, m in matches if m}

    @cached_property
    def _masks(self) -> dict[tuple[str, str, str, str], Path]:
        return _named(self.root / "video-masks" / "real")

    @cached_property
    def _categories(self) -> dict[str, str]:
        return self._described_as("category")

    @cached_property
    def _descriptions(self) -> dict[str, str]:
        return self._described_as("description")

    def _described_as(self, column: str) -> dict[str, str]:
        """A column of the descriptions by the captions of prompts; of both takes, the first's."""
        path, values = self.described, {}
        for row in csv_rows(path) if path else ():
            name = str(row.values.get("generated_video_name", ""))
            match = _GENERATED.fullmatch(Path(name).stem)
            if match and (value := row.values.get(column)):
                values.setdefault(f"{match['view']}_{match['name']}", str(value))
        return values


def _filmed(path: Path, count: int) -> Iterator[np.ndarray]:
    """The frames of a film or mask that has `count` of them in 5 seconds, to half a frame.

    Raises:
        ClipError: It has another rate, so that frames with equal numbers are of different times.
    """
    rate = read_shape(path).fps
    if abs(SECONDS * rate - count) > 0.5:
        raise ClipError(
            f"{path} has {rate:g} frames a second and not the {count / SECONDS:g} that its name "
            "says, so its frames are of other times than the clip's. Download it again, or take it "
            "away."
        )
    return iterate(path)


def _named(folder: Path) -> dict[tuple[str, str, str, str], Path]:
    matches = ((path, _REAL.fullmatch(path.stem)) for path in sorted(folder.rglob("*.mp4")))
    return {(m["fps"], m["view"], m["take"], m["name"]): path for path, m in matches if m}


def experiment(caption: str) -> str:
    """The experiment that a clip of a caption shows, whatever its file or its id is called."""
    return caption.partition("_")[2]


def keys() -> list[str]:
    """The columns that `Filmed.score` gives: of the clip, of the takes and of the first frame."""
    return [f"{metric}{of}" for of in ("", "_takes", "_static") for metric in METRICS]
