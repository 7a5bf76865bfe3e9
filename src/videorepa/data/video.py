"""Reads videos, as clips of a fixed shape or frame by frame, and writes them as mp4.

Whatever is wrong with a file, reading it raises ClipError with the reason.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

import av
import numpy as np
from av.container import InputContainer
from av.error import FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8

from videorepa.errors import ClipError
from videorepa.system.files import atomic_path

if TYPE_CHECKING:
    from torch import Tensor

BT709 = 1
"""The code of BT.709's matrix, primaries and transfer curve in H.264 and FFmpeg."""

LIMITED_RANGE = 1
"""The code of luma from 16 to 235, which every player expects of H.264."""


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, FFmpegError) else None) or str(error)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    try:
        if not path.is_file():
            what = "is not a file" if path.exists() else "does not exist"
            raise ClipError(f"{path} {what}; expected a video")
        if path.stat().st_size == 0:
            raise ClipError(f"{path} is empty; copy or download it again")
    except (OSError, ValueError) as error:
        raise ClipError(f"{path} cannot be opened: {error}") from error
    try:
        container = av.open(
            # FFmpeg would take a relative name like "clip:1.mp4" for a protocol.
            str(path.absolute()),
            # A title in another encoding is no reason to lose a clip.
            metadata_errors="replace",
        )
    except (FFmpegError, OSError, ValueError) as error:
        raise ClipError(f"{path} cannot be opened as a video: {_reason(error)}") from error
    with container:
        # The first one may be a cover picture.
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream):
            raise ClipError(f"{path} holds no video stream")
        # PyAV's types promise a context, but there is none for a codec that this FFmpeg lacks.
        if not stream.codec_context:
            raise ClipError(f"{path}: its video codec is unknown to FFmpeg; convert it to H.264")
        stream.thread_type = "AUTO"
        yield container, stream


def _announced(container: InputContainer, stream: VideoStream) -> int:
    """Read from the container how many frames it shows; 0 if it does not say."""
    if "mp4" not in container.format.name:
        return stream.frames
    # An mp4 counts all frames that it stores. Those that an edit list cuts away have no entry in
    # the index, or one that is marked as needed for decoding alone.
    index = stream.index_entries
    shown = sum(not index[entry].is_discard for entry in range(len(index)))
    return min(stream.frames, shown)


def _decode(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Decode every frame in order. Raises ClipError at the end if some were missing, or all."""
    announced, count, fault = _announced(container, stream), 0, ""
    try:
        for frame in container.decode(stream):
            if not frame.is_corrupt:
                count += 1
                yield frame
    except (FFmpegError, OSError, ValueError) as error:
        fault = _reason(error)
    what = "; the file is cut off or damaged" + (f" ({fault})" if fault else "")
    if count < announced:
        raise ClipError(f"{path}: {count} frames decode, but it announces {announced}{what}")
    if fault or count == 0:
        raise ClipError(f"{path}: {count} frames decode{what}")


def _to_rgb(path: Path, frame: VideoFrame) -> np.ndarray:
    """Turn a frame upright, (h, w, 3) uint8: phones store turned pictures and their angle."""
    try:
        pixels = frame.to_ndarray(format="rgb24")
    except (FFmpegError, ValueError) as error:
        raise ClipError(f"{path}: its pixels cannot be read: {_reason(error)}") from error
    return np.rot90(pixels, round(frame.rotation / 90)) if frame.rotation else pixels


def _fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre-crop (h, w, 3) uint8 to the target's aspect ratio, then scale it to the target."""
    h, w = pixels.shape[:2]
    if w * height > h * width:
        crop_h, crop_w = h, max(1, round(h * width / height))
    else:
        crop_h, crop_w = max(1, round(w * height / width)), w
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    crop = pixels[top : top + crop_h, left : left + crop_w]
    return _resize(crop, height, width)


def _resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (h, w, 3) uint8 bilinearly with antialiasing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # Takes seconds, for which writing or listing videos should not wait.

    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(
        image, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return image[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


def read_frames(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    """Sample a clip of a fixed shape from a video.

    Of the video's n frames it takes every (n // frames)-th, from the first on. Of a video with
    fewer than `frames` it takes all, and repeats the last. Each frame is cropped around its centre
    to the target's aspect ratio and scaled bilinearly with antialiasing; a frame of the target's
    size keeps its pixels. Pixels count as square, whatever the container says. Memory holds one
    frame of full size at a time.

    Args:
      path: The video.
      frames: Frames of the clip.
      height: Rows of the clip.
      width: Columns of the clip.

    Returns:
      (frames, height, width, 3) uint8 RGB.

    Raises:
      ClipError: The file cannot be used.
      ValueError: The target is smaller than one frame of one pixel.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"asked for {frames} frames of {height}x{width}; expected 1 or more each")
    # The stride depends on n, which only decoding tells. The announced number is nearly always
    # right. Where it is not, the video is read a second time.
    expected = None
    while True:
        with _opened(path) as (container, stream):
            if expected is None:
                expected = _announced(container, stream)
            stride, n, clip = max(1, expected // frames), 0, []
            for frame in _decode(path, container, stream):
                if n % stride == 0 and len(clip) < frames:
                    clip.append(_fit(_to_rgb(path, frame), height, width))
                n += 1
        if stride == max(1, n // frames):
            break
        expected = n
    return np.stack(clip + clip[-1:] * (frames - len(clip)))


def read_chosen(path: Path, indices: Sequence[int], height: int, width: int) -> np.ndarray:
    """Read the frames with these numbers, stretched to a size.

    Args:
      path: The video.
      indices: Numbers of frames, from 0; past the video's end they mean its last frame.
      height: Rows of the result.
      width: Columns of the result.

    Returns:
      (len(indices), height, width, 3) uint8 RGB, scaled bilinearly with antialiasing.

    Raises:
      ClipError: The file cannot be used.
    """
    wanted, chosen = set(indices), {}
    with _opened(path) as (container, stream):
        number, frame = -1, None
        for number, frame in enumerate(_decode(path, container, stream)):
            if number in wanted:
                chosen[number] = _resize(_to_rgb(path, frame), height, width)
            if number == max(wanted):
                break
        else:
            assert frame is not None  # A video without frames raises.
            chosen[number] = _resize(_to_rgb(path, frame), height, width)
    return np.stack([chosen[min(index, number)] for index in indices])


def read_squashed(path: Path, height: int, width: int) -> np.ndarray:
    """Read every frame, stretched to a size: (n, height, width, 3) uint8 RGB.

    FFmpeg's bilinear filter scales the frames on the way to RGB. To the bit, that is what decord
    gives, with which the judges were trained. Raises ClipError.
    """
    with _opened(path) as (container, stream):
        graph = Graph()
        nodes = (
            graph.add_buffer(template=stream),
            graph.add("scale", f"{width}:{height}:flags=bilinear"),
            graph.add("format", "rgb24"),
            graph.add("buffersink"),
        )
        graph.link_nodes(*nodes).configure()
        clip = []
        for frame in _decode(path, container, stream):
            try:
                graph.vpush(frame)
                scaled = graph.vpull()
            except (FFmpegError, ValueError) as error:
                raise ClipError(f"{path}: a frame cannot be scaled: {_reason(error)}") from error
            clip.append(_to_rgb(path, scaled))
    return np.stack(clip)


def iterate(path: Path) -> Iterator[np.ndarray]:
    """Read every frame as it is, (h, w, 3) uint8 RGB, one at a time. Raises ClipError."""
    with _opened(path) as (container, stream):
        for frame in _decode(path, container, stream):
            yield _to_rgb(path, frame)


def read_all(path: Path) -> tuple[np.ndarray, float]:
    """Read all frames as they are, (n, h, w, 3) uint8 RGB, and their rate in frames per second.

    Raises ClipError.
    """
    with _opened(path) as (container, stream):
        clip = [_to_rgb(path, frame) for frame in _decode(path, container, stream)]
        rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise ClipError(f"{path} does not say how many frames it shows per second")
    sizes = sorted({pixels.shape[:2] for pixels in clip})
    if len(sizes) > 1:
        raise ClipError(f"{path}: its frames change their size, (height, width) is {sizes}")
    return np.stack(clip), float(rate)


def to_video(frames: UInt8[np.ndarray, "*b h w 3"]) -> Float[Tensor, "*b 3 h w"]:
    """Convert frames to a float32 video in [0, 1], which encoders and backbones take."""
    import torch

    return torch.from_numpy(frames).movedim(-1, -3).float() / 255.0


def write_video(path: Path, frames: np.ndarray, fps: int | float | Fraction, crf: int = 12) -> None:
    """Write frames as an H.264 mp4 that browsers play while it loads.

    Equal frames give equal bytes, and the file is whole or absent.

    Args:
      path: The file to write.
      frames: (n, height, width, 3) uint8 RGB, with an even height and width.
      fps: Frames per second, rounded to a fraction with a denominator of at most 1001, as broadcast
        rates have.
      crf: x264's rate factor, from 0 (lossless except for the colour conversion) to 51 (coarse).

    Raises:
      ValueError: An argument is outside its range, or the frames have another shape or dtype.
      OSError: The file cannot be written.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise ValueError(
            f"frames are {frames.dtype} of shape {frames.shape}; "
            "expected uint8 (n, height, width, 3)"
        )
    n, height, width, _ = frames.shape
    if n == 0 or height == 0 or width == 0:
        raise ValueError(f"frames have shape {frames.shape}: there is nothing to write")
    if height % 2 or width % 2:
        raise ValueError(
            f"frames are {height}x{width}; H.264's 4:2:0 pixels need an even height and width: "
            "crop or pad them"
        )
    if not 0 <= crf <= 51:
        raise ValueError(f"crf is {crf}; expected 0 to 51")
    rate = Fraction(fps).limit_denominator(1001) if math.isfinite(fps) else Fraction(0)
    if rate <= 0:
        raise ValueError(f"fps is {fps}; expected a positive number, 1/1001 or more")
    # bitexact leaves out the time and FFmpeg's version.
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with (
        atomic_path(path) as temporary,
        av.open(str(temporary.absolute()), "w", format="mp4", options=options) as container,
    ):
        # With AVX-512, x264's macroblock tree reads memory that nobody wrote: equal frames came out
        # unequal once in twenty or so.
        stream = container.add_stream(
            "libx264", rate=rate, options={"crf": str(crf), "x264-params": "mbtree=0"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        context = stream.codec_context
        # With several threads, x264's decisions depend on their number.
        context.thread_count = 1
        # Without these, players guess from the size, and colours shift.
        context.colorspace = context.color_primaries = context.color_trc = BT709
        context.color_range = LIMITED_RANGE
        for number, pixels in enumerate(frames):
            frame = VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG"
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
