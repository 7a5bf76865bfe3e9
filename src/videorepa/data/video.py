"""Reads videos, as clips of a fixed shape or frame by frame, and writes them as mp4.

Whatever is wrong with a file, reading it raises ClipError with the reason.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.error import ArgumentError, FFmpegError
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream
from jaxtyping import Float, UInt8

from videorepa.data import hdr
from videorepa.data.sampling import Sampling
from videorepa.errors import ClipError
from videorepa.system.files import atomic_path, check_is_file

if TYPE_CHECKING:
    from torch import Tensor

    from videorepa.world.simulator import Scene

READER = 2
"""Changes whenever the same file may give other frames than before, so that caches are refused.
Since 2, mirrored pictures are put upright and HDR is mapped to BT.709."""

BT709 = 1
"""The code of BT.709's matrix, primaries and transfer curve in H.264 and FFmpeg."""

BT2020, UNSPECIFIED = 9, 2
"""Likewise BT.2020's primaries and matrix, and colours that the file does not tell."""

CONTAINERS = (
    *("mov", "matroska", "avi", "mpegts", "mpeg", "flv", "asf", "ogg", "mxf", "nut", "wtv", "gif"),
    *("ivf", "dv", "yuv4mpegpipe", "h264", "hevc", "obu", "m4v", "mpegvideo", "mjpeg", "apng"),
    *("image2", "jpeg_pipe", "png_pipe", "webp_pipe", "bmp_pipe", "tiff_pipe"),
)
"""ffmpeg's names of the formats that are opened: those whose content lies in the file itself. Its
others include playlists, scripts and network sessions, which lead elsewhere."""

NO_FRAME_BYTES = 19
"""Size up to which ffmpeg takes a chunk of MPEG-4 for a mere sign that there is no new frame."""

EARLY = 0.499
"""Part of a frame's time by which one may be shown early. At a half, rounding would decide."""

LEAN = 0.0175
"""Tangent of the angle, one degree, that a picture may lean, as in ffmpeg."""

THREADS = 1
"""Threads that convert a frame. More cost more than they save at the sizes of training clips, and
a process that was forked waits for ever for those of its parent when it frees them."""

LIMITED_RANGE = 1
"""The code of luma from 16 to 235, which every player expects of H.264."""


def _reason(error: Exception) -> str:
    return (error.strerror if isinstance(error, FFmpegError) else None) or str(error)


@contextmanager
def opened(path: Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a video file, and choose its best video stream. Everything that reads a video starts
    here. Raises ClipError, here and within the block where ffmpeg fails."""
    try:
        check_is_file(path)
        size = path.stat().st_size
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ClipError(f"{path}: {reason}; expected a video") from error
    if size == 0:
        raise ClipError(f"{path} is empty; copy or download it again")
    try:
        container = av.open(
            # FFmpeg would take a relative name like "clip:1.mp4" for a protocol.
            str(path.absolute()),
            # A title in another encoding is no reason to lose a clip.
            metadata_errors="replace",
            container_options={
                "format_whitelist": ",".join(CONTAINERS),
                "protocol_whitelist": "file",
                # A picture called "a%d.png" is that one, not a series.
                "pattern_type": "none",
            },
        )
    except ArgumentError as error:
        raise ClipError(
            f"{path} is not in a format of video that is opened here (MP4, MOV, Matroska, WebM, "
            "AVI, MPEG and some more; playlists are not followed); convert it to MP4"
        ) from error
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


def _announced(path: Path, container: InputContainer, stream: VideoStream) -> int:
    """How many frames the container says will be shown, 0 if it does not say."""
    is_avi = container.format.name == "avi"
    if not (is_avi or "mp4" in container.format.name) or (is_avi and _is_cut_off(path)):
        return stream.frames
    # An mp4 counts all it stores. What an edit list cuts away has no entry in the index, or one
    # marked as needed for decoding alone. An AVI counts chunks, and where a frame was dropped, or
    # B-frames delay the first one, a chunk is empty and has no entry. In MPEG-4 (XviD) a few bytes
    # can stand for a dropped frame as well.
    least = NO_FRAME_BYTES if stream.codec_context.name == "mpeg4" else 0
    index = (stream.index_entries[number] for number in range(len(stream.index_entries)))
    shown = sum(entry.size > least and not entry.is_discard for entry in index)
    return min(stream.frames, shown)


def _is_cut_off(avi: Path) -> bool:
    """Whether its RIFF chunks, which hold everything else, say more bytes than the file has."""
    start, size = 0, avi.stat().st_size
    with avi.open("rb") as file:
        while start < size:
            file.seek(start)
            head = file.read(8)
            if len(head) < 8 or head[:4] != b"RIFF":
                break  # What follows the last one is nothing of the video's.
            start += 8 + int.from_bytes(head[4:], "little")
    return start > size


def _decode(path: Path, container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame in order; then ClipError if there was none, or if some were missing."""
    announced, count, fault = _announced(path, container, stream), 0, ""
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
    """(h, w, 3) uint8, upright, and with standard dynamic range."""
    try:
        pixels = _to_sdr(path, frame).to_ndarray(format="rgb24", threads=THREADS)
    except (FFmpegError, ValueError) as error:
        raise ClipError(f"{path}: its pixels cannot be read: {_reason(error)}") from error
    return _placement(path, frame).apply(pixels)


def _to_sdr(path: Path, frame: VideoFrame) -> VideoFrame:
    """The frame itself, or what HDR looks like on a standard display."""
    if frame.color_trc not in (hdr.PQ, hdr.HLG):
        return frame
    colours = (frame.color_primaries, frame.colorspace)
    if not {*colours} <= {BT2020, UNSPECIFIED}:
        raise ClipError(
            f"{path} is HDR with primaries {colours[0]} and matrix {colours[1]}; expected "
            f"BT.2020's, {BT2020} and {BT2020}: convert it to BT.709"
        )
    signal = frame.to_ndarray(format="rgb48le", src_colorspace=Colorspace.BT2020, threads=THREADS)
    return VideoFrame.from_ndarray(hdr.to_sdr(signal, frame.color_trc), format="rgb24")


class _Placement(NamedTuple):
    """How to put a stored picture upright: phones and cameras turn and mirror what they store."""

    transpose: bool
    flip_rows: bool
    flip_columns: bool

    def apply(self, pixels: np.ndarray) -> np.ndarray:
        pixels = pixels.swapaxes(0, 1) if self.transpose else pixels
        pixels = pixels[:: -1 if self.flip_rows else 1, :: -1 if self.flip_columns else 1]
        return np.ascontiguousarray(pixels)


def _placement(path: Path, frame: VideoFrame) -> _Placement:
    # What is stored at (x, y) is shown at (a x + c y, b x + d y), but for a shift.
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is None:
            return _Placement(False, False, False)
        a, b, _, c, d, *_ = struct.unpack("=9i", bytes(matrix))
    except ValueError:
        # PyAV fails where a frame holds any data of a kind newer than PyAV, such as EXIF. The turn
        # it still tells, though not whether the picture is mirrored.
        turn = math.radians(frame.rotation)
        a = d = math.cos(turn)
        b, c = -math.sin(turn), math.sin(turn)
    straight, across = abs(a) + abs(d), abs(b) + abs(c)
    if min(straight, across) > LEAN * max(straight, across):
        raise ClipError(
            f"{path} is to be shown turned by {frame.rotation} degrees; expected a multiple of 90: "
            "write it anew, upright"
        )
    return _Placement(True, b < 0, c < 0) if across > straight else _Placement(False, d < 0, a < 0)


def fit(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Centre-crop (h, w, 3) uint8 to the target's aspect ratio, then scale it to the target."""
    h, w = pixels.shape[:2]
    if w * height > h * width:
        crop_h, crop_w = h, max(1, round(h * width / height))
    else:
        crop_h, crop_w = max(1, round(w * height / width)), w
    top, left = (h - crop_h) // 2, (w - crop_w) // 2
    crop = pixels[top : top + crop_h, left : left + crop_w]
    return resize(crop, height, width)


def resize(pixels: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale (h, w, 3) uint8 bilinearly with antialiasing."""
    if pixels.shape[:2] == (height, width):
        return pixels
    import torch  # Takes seconds, for which writing or listing videos should not wait.

    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float()
    image = torch.nn.functional.interpolate(
        image, (height, width), mode="bilinear", antialias=True, align_corners=False
    )
    return image[0].permute(1, 2, 0).round().to(torch.uint8).numpy()


class Sampled(NamedTuple):
    """A clip of a fixed shape.

    Attributes:
      frames: (frames, height, width, 3) uint8 RGB.
      sampling: How it was sampled from its video.
      scene: What the simulator drew it from; None for a video.
    """

    frames: np.ndarray
    sampling: Sampling
    scene: Scene | None = None


def sample_clip(
    path: Path, frames: int, height: int, width: int, fps: float | None = None
) -> Sampled:
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
      fps: Frames per second that the clip shows. In place of every n-th it then has the frame that
        is shown at each of its times, or comes within half a frame, from the first one's on. It
        repeats frames of a slower video. What comes after the clip is not read.

    Raises:
      ClipError: The file cannot be used.
      ValueError: The target is smaller than one frame of one pixel.
    """
    if min(frames, height, width) < 1:
        raise ValueError(f"asked for {frames} frames of {height}x{width}; expected 1 or more each")
    if fps is not None:
        return _sample_at(path, frames, height, width, fps)
    # The stride depends on n, which only decoding tells. The announced number is nearly always
    # right. Where it is not, the video is read a second time.
    expected = None
    while True:
        with opened(path) as (container, stream):
            if expected is None:
                expected = _announced(path, container, stream)
            stride, n, clip = max(1, expected // frames), 0, []
            for frame in _decode(path, container, stream):
                if n % stride == 0 and len(clip) < frames:
                    clip.append(fit(_to_rgb(path, frame), height, width))
                n += 1
            rate = _maybe_rate(stream)
        if stride == max(1, n // frames):
            break
        expected = n
    sampling = _strided(n, frames, rate)
    return Sampled(np.stack(clip + clip[-1:] * (frames - len(clip))), sampling)


def read_first(path: Path, height: int, width: int, fps: float | None = None) -> np.ndarray:
    """Read the first frame of what `sample_clip` gives, (height, width, 3) uint8 RGB, and few more.

    Raises ClipError.
    """
    if fps is not None:
        return _sample_at(path, 1, height, width, fps).frames[0]
    with opened(path) as (container, stream):
        return fit(_to_rgb(path, next(_decode(path, container, stream))), height, width)


def _sample_at(path: Path, frames: int, height: int, width: int, fps: float) -> Sampled:
    clip: list[np.ndarray] = []
    distinct, n, before = 0, 0, None
    with opened(path) as (container, stream):
        early = EARLY / max(fps, _maybe_rate(stream) or fps)
        for coming in chain(_timed(path, container, stream), [None]):
            if before is not None:
                until = math.inf if coming is None else coming[0] - early
                pixels = None
                while len(clip) < frames and len(clip) / fps < until:
                    if pixels is None:
                        pixels = fit(_to_rgb(path, before[1]), height, width)
                        distinct += 1
                    clip.append(pixels)
            before, n = coming, n + (coming is not None)
            if len(clip) == frames:
                break
    return Sampled(np.stack(clip), Sampling(distinct, None, fps if n > 1 else None))


def _timed(
    path: Path, container: InputContainer, stream: VideoStream
) -> Iterator[tuple[float, VideoFrame]]:
    """Every frame, and the seconds at which it is shown after the first. Raises ClipError."""
    rate, start = _maybe_rate(stream), None
    for number, frame in enumerate(_decode(path, container, stream)):
        time = number / rate if frame.time is None and rate else frame.time
        if time is None:
            raise ClipError(f"{path} does not say when it shows its frames; convert it to MP4")
        start = time if start is None else start
        yield time - start, frame


def foresee_sampling(path: Path, frames: int, fps: float | None = None) -> Sampling | None:
    """Predict from the header alone how `sample_clip` samples a clip.

    Returns:
      None where the header does not tell how many frames there are, or at which rate.

    Raises:
      ClipError: The file cannot be opened as a video.
    """
    with opened(path) as (container, stream):
        rate, n = _maybe_rate(stream), _announced(path, container, stream)
        if not n and rate and container.duration:
            n = round(container.duration / av.time_base * rate)
    if fps is None or n == 1:
        return _strided(n, frames, rate) if n else None
    if not n or not rate:
        return None
    early = EARLY / max(fps, rate)
    shown = {min(n - 1, int((number / fps + early) * rate)) for number in range(frames)}
    return Sampling(len(shown), None, fps)


def _strided(n: int, frames: int, rate: float | None) -> Sampling:
    """How a clip of `frames` is sampled from a video of n frames."""
    stride = max(1, n // frames)
    fps = rate / stride if rate and n > 1 else None
    return Sampling(min(n, frames), stride, fps)


def _maybe_rate(stream: VideoStream) -> float | None:
    rate = stream.average_rate or stream.guessed_rate
    return float(rate) if rate else None


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
    with opened(path) as (container, stream):
        number, frame = -1, None
        for number, frame in enumerate(_decode(path, container, stream)):
            if number in wanted:
                chosen[number] = resize(_to_rgb(path, frame), height, width)
            if number == max(wanted):
                break
        else:
            assert frame is not None  # A video without frames raises.
            chosen[number] = resize(_to_rgb(path, frame), height, width)
    return np.stack([chosen[min(index, number)] for index in indices])


def read_squashed(path: Path, height: int, width: int) -> np.ndarray:
    """Read every frame, stretched to a size: (n, height, width, 3) uint8 RGB.

    FFmpeg's bilinear filter scales the frames on the way to RGB. To the bit, that is what decord
    gives, with which the judges were trained. Raises ClipError.
    """
    graph, clip = None, []
    with opened(path) as (container, stream):
        for frame in _decode(path, container, stream):
            placement = _placement(path, frame)
            try:
                shown = _to_sdr(path, frame)
                if graph is None:
                    size = (height, width) if placement.transpose else (width, height)
                    graph = _scaling(shown, *size)
                graph.vpush(shown)
                pixels = graph.vpull().to_ndarray(format="rgb24", threads=THREADS)
            except (FFmpegError, ValueError) as error:
                raise ClipError(f"{path}: a frame cannot be scaled: {_reason(error)}") from error
            clip.append(placement.apply(pixels))
    return np.stack(clip)


def _scaling(frame: VideoFrame, width: int, height: int) -> Graph:
    graph = Graph()
    graph.threads = THREADS
    nodes = (
        graph.add_buffer(
            width=frame.width, height=frame.height, format=frame.format, time_base=Fraction(1)
        ),
        graph.add("scale", f"{width}:{height}:flags=bilinear"),
        graph.add("format", "rgb24"),
        graph.add("buffersink"),
    )
    graph.link_nodes(*nodes).configure()
    return graph


class Shape(NamedTuple):
    """A video's frames per second and its size; frames is 0 where only reading tells it."""

    fps: float
    frames: int
    height: int
    width: int


def read_shape(path: Path) -> Shape:
    """The shape of a video as it is shown, from its header and its first frame. Raises
    ClipError."""
    with opened(path) as (container, stream):
        height, width = _to_rgb(path, next(_decode(path, container, stream))).shape[:2]
        return Shape(_rate(path, stream), _announced(path, container, stream), height, width)


def _rate(path: Path, stream: VideoStream) -> float:
    rate = _maybe_rate(stream)
    if rate is None:
        raise ClipError(f"{path} does not say how many frames it shows per second")
    return rate


def iterate(path: Path) -> Iterator[np.ndarray]:
    """Every frame as it is, (h, w, 3) uint8 RGB, one at a time. Raises ClipError."""
    with opened(path) as (container, stream):
        for frame in _decode(path, container, stream):
            yield _to_rgb(path, frame)


def read_all(path: Path) -> tuple[np.ndarray, float]:
    """Read all frames as they are, (n, h, w, 3) uint8 RGB, and their rate in frames per second.

    Raises ClipError.
    """
    with opened(path) as (container, stream):
        clip = [_to_rgb(path, frame) for frame in _decode(path, container, stream)]
        rate = _rate(path, stream)
    sizes = sorted({pixels.shape[:2] for pixels in clip})
    if len(sizes) > 1:
        raise ClipError(f"{path}: its frames change their size, (height, width) is {sizes}")
    return np.stack(clip), rate


def to_video(
    frames: UInt8[np.ndarray, "*b h w 3"] | UInt8[Tensor, "*b h w 3"],
) -> Float[Tensor, "*b 3 h w"]:
    """Convert frames, where they are, to a float32 video in [0, 1], as encoders take it."""
    import torch

    pixels = torch.as_tensor(frames).movedim(-1, -3).float()
    # A tensor, since CUDA would multiply by the rounded reciprocal of a number, and give other bits
    # than the CPU.
    return pixels / torch.tensor(255.0, device=pixels.device)


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
                format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG", threads=THREADS
            )
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
