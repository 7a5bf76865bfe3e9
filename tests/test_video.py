"""Sampling, refusing and writing videos."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videorepa.data import hdr, video
from videorepa.data.sampling import Sampling, sampling_notes
from videorepa.data.video import foresee_sampling, read_all, read_first, sample_clip, write_video
from videorepa.errors import ClipError
from videorepa.system.files import atomic_path, atomic_write, file_digest
from videorepa.world.render import make_clip

CLIPS = Path(__file__).resolve().parents[1].parent / "shared" / "clips"
STEP = 4
"""Gray levels between one frame of a numbered video and the next: more than the codec's error."""


def numbered(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """A video whose frames tell their own number by their gray level."""
    levels = (np.arange(count, dtype=np.uint8) * STEP)[:, None, None, None]
    return np.broadcast_to(levels, (count, height, width, 3)).copy()


def read_frames(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    return sample_clip(path, frames, height, width).frames


def numbers(frames: np.ndarray) -> list[int]:
    return [round(float(frame.mean()) / STEP) for frame in frames]


def coloured(height: int = 64, width: int = 96) -> np.ndarray:
    blocks = np.random.default_rng(0).integers(0, 256, (height // 16, width // 16, 3), np.uint8)
    image = blocks.repeat(16, 0).repeat(16, 1)
    return np.stack([np.roll(image, 16 * shift, 1) for shift in range(6)])


def write_unannounced(path: Path, frames: np.ndarray) -> None:
    """A Matroska file, whose header says nothing about the number of frames."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1"})
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def patch(path: Path, box: bytes, offset: int, data: bytes) -> None:
    """Overwrite bytes of an mp4's box, counted from behind its name."""
    content = bytearray(path.read_bytes())
    at = content.index(box) + 4 + offset
    content[at : at + len(data)] = data
    path.write_bytes(content)


@pytest.fixture(scope="module")
def numbered_files(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    folder = tmp_path_factory.mktemp("numbered")
    files = {n: folder / f"{n}.mp4" for n in (1, 2, 7, 30, 61)}
    for n, path in files.items():
        write_video(path, numbered(n), 8)
    return files


@settings(max_examples=25, deadline=None)
@given(n=st.sampled_from((1, 2, 7, 30, 61)), frames=st.integers(1, 70))
def test_sampling_rule(numbered_files: dict[int, Path], n: int, frames: int) -> None:
    found = numbers(read_frames(numbered_files[n], frames, 32, 48))
    if n >= frames:
        assert found == list(range(0, n, n // frames))[:frames]
    else:
        assert found == list(range(n)) + [n - 1] * (frames - n)


def test_sampling_without_an_announced_number(tmp_path: Path) -> None:
    write_unannounced(tmp_path / "clip.mkv", numbered(50))
    with av.open(str(tmp_path / "clip.mkv")) as container:
        assert container.streams.video[0].frames == 0
    assert numbers(read_frames(tmp_path / "clip.mkv", 7, 32, 48)) == list(range(0, 49, 7))


def test_a_number_announced_too_low_is_not_believed(
    numbered_files: dict[int, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(video, "_announced", lambda *given: 10)
    assert numbers(read_frames(numbered_files[61], 10, 32, 48)) == list(range(0, 60, 6))


def test_how_a_clip_was_sampled_is_said_and_foreseen(
    numbered_files: dict[int, Path], tmp_path: Path
) -> None:
    write_video(tmp_path / "24.mp4", numbered(61), 24)
    write_unannounced(tmp_path / "clip.mkv", numbered(50))
    still = tmp_path / "still.jpg"
    with av.open(str(still), "w") as container:
        stream = container.add_stream("mjpeg", rate=25)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(1)[0], format="rgb24")))
        container.mux(stream.encode())
    for path, frames, fps, expected in (
        (tmp_path / "24.mp4", 60, None, Sampling(60, 1, 24.0)),
        (tmp_path / "24.mp4", 30, None, Sampling(30, 2, 12.0)),
        (tmp_path / "24.mp4", 30, 24.0, Sampling(30, None, 24.0)),
        (tmp_path / "24.mp4", 30, 8.0, Sampling(21, None, 8.0)),
        (tmp_path / "clip.mkv", 17, None, Sampling(17, 2, 4.0)),
        (numbered_files[7], 17, None, Sampling(7, 1, 8.0)),
        (numbered_files[1], 17, None, Sampling(1, 1, None)),
        (numbered_files[1], 17, 8.0, Sampling(1, None, None)),
        (still, 17, None, Sampling(1, 1, None)),
    ):
        assert sample_clip(path, frames, 32, 48, fps).sampling == expected
        if path != still and expected.fps is not None:
            assert foresee_sampling(path, frames, fps) == expected


@pytest.mark.parametrize(
    ("rate", "fps", "expected"),
    [
        (24, 8, [0, 3, 6, 9, 12, 15]),
        (24, 24, [0, 1, 2, 3, 4, 5]),
        (30, 8, [0, 4, 7, 11, 15, 19]),
        (Fraction(30000, 1001), 30, [0, 1, 2, 3, 4, 5]),
        (12, 24, [0, 0, 1, 1, 2, 2]),
    ],
)
def test_a_fixed_rate_takes_the_frames_that_are_shown_then(
    tmp_path: Path, rate: Fraction, fps: float, expected: list[int]
) -> None:
    write_video(tmp_path / "clip.mp4", numbered(20), rate)
    clip = sample_clip(tmp_path / "clip.mp4", 6, 32, 48, fps)
    assert numbers(clip.frames) == expected
    assert clip.sampling == Sampling(len(set(expected)), None, fps)


@pytest.mark.parametrize(("frames", "decoded"), [(1, 2), (4, 7), (6, 11), (10, 19), (11, 20)])
def test_nothing_is_decoded_after_a_clip_of_a_fixed_rate(
    tmp_path: Path, monkeypatch, frames: int, decoded: int
) -> None:
    """The next frame tells how long the last one is shown."""
    write_video(tmp_path / "clip.mp4", numbered(20), 16)
    seen, decode = [], video._decode

    def counted(*arguments) -> Iterator:
        for frame in decode(*arguments):
            seen.append(frame)
            yield frame

    monkeypatch.setattr(video, "_decode", counted)
    clip = sample_clip(tmp_path / "clip.mp4", frames, 32, 48, fps=8)
    assert clip.sampling == Sampling(frames, None, 8)
    assert abs(len(seen) - decoded) <= 1


@pytest.mark.parametrize("fps", [None, 8, 30])
def test_a_first_frame_is_that_of_the_clip(tmp_path: Path, fps: float | None) -> None:
    write_video(tmp_path / "clip.mp4", numbered(20, 40, 64), 16)
    clip = sample_clip(tmp_path / "clip.mp4", 4, 32, 48, fps)
    assert np.array_equal(read_first(tmp_path / "clip.mp4", 32, 48, fps), clip.frames[0])


def test_a_fixed_rate_follows_the_times_that_a_video_tells(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "clip.mkv"), "w", format="matroska") as container:
        stream = container.add_stream("libx264", rate=8, options={"crf": "1", "bf": "0"})
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        # It starts late, and rests on its third frame for a second.
        for pixels, time in zip(numbered(6), (500, 625, 750, 1750, 1875, 2000), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    clip = sample_clip(tmp_path / "clip.mkv", 9, 32, 48, fps=4)
    assert numbers(clip.frames) == [0, 2, 2, 2, 2, 3, 5, 5, 5]
    assert clip.sampling == Sampling(4, None, 4)


def test_rates_and_clips_that_were_filled_up_are_counted() -> None:
    samplings = {
        "a": Sampling(17, 1, 24.0),
        "b": Sampling(17, 2, 12.0),
        "c": Sampling(17, 1, 24000 / 1001),
        "d": Sampling(17, 1, 24.0),
        "still": Sampling(1, 1, None),
    }
    rates, short, told = sampling_notes(samplings, 17, told=24)
    assert rates == (
        "Rates: 2 clips at 24 fps, every frame; 1 clip at 12 fps, 1 frame in 2; 1 clip at 23.98 "
        "fps, every frame; 1 clip without a rate. With data.fps all show the same."
    )
    assert "1 of 5 clips have fewer than 17 frames" in short and "'still', with 1." in short
    assert "1 of 5 clips do not show the 24 frames" in told and "'b', with 12." in told
    alike = {str(number): Sampling(17, None, 24) for number in range(3)}
    assert sampling_notes(alike, 17, told=24) == ["Rates: 3 clips at 24 fps."]


def test_frames_cut_by_an_edit_list_are_not_missing(tmp_path: Path) -> None:
    path = tmp_path / "cut.mp4"
    write_video(path, numbered(40), 8)
    content = path.read_bytes()
    at = content.index(b"elst") + 12
    duration, start = struct.unpack(">II", content[at : at + 8])
    # Keep the last half: durations are in the movie's time base, starts in the track's.
    with av.open(str(path)) as container:
        time_base = container.streams.video[0].time_base
    assert time_base is not None
    start += round(20 / 8 / time_base)
    patch(path, b"elst", 8, struct.pack(">II", duration // 2, start))
    assert numbers(read_all(path)[0]) == list(range(20, 40))
    assert numbers(read_frames(path, 5, 32, 48)) == [20, 24, 28, 32, 36]


def test_matching_size_is_untouched(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", coloured(), 8)
    everything, fps = read_all(tmp_path / "clip.mp4")
    assert fps == 8.0
    assert np.array_equal(read_frames(tmp_path / "clip.mp4", 6, 64, 96), everything)


def test_crop_is_central() -> None:
    image = np.zeros((40, 100, 3), np.uint8)
    image[:, 30:70] = 200
    assert (video.fit(image, 40, 40) == 200).all()
    assert (video.fit(image, 20, 20) == 200).all()
    assert (video.fit(image.transpose(1, 0, 2), 20, 20) == 200).all()
    assert not (video.fit(image, 20, 22) == 200).all()


def test_shrinking_uses_antialias_and_rounds() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, 1::4] = 255
    # A quarter of 255 is 63.75. Without antialias two columns of four would count: 127.5.
    assert (video.fit(stripes, 16, 16)[:, 1:-1] == 64).all()
    constant = np.full((50, 70, 3), 77, np.uint8)
    assert (video.fit(constant, 33, 21) == 77).all()


def test_scaled_values_agree_with_pillow() -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)
    expected = image_module.fromarray(pixels).resize((36, 24), image_module.Resampling.BILINEAR)
    assert abs(video.fit(pixels, 24, 36).astype(int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("size", [(0, 8, 8), (4, 0, 8), (4, 8, -1)])
def test_impossible_target_is_refused(tmp_path: Path, size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        read_frames(tmp_path / "any.mp4", *size)


# Each display matrix that cameras write, and the quarters of RED GREEN / BLUE WHITE as ffmpeg
# shows them with it, row by row.
MATRICES = {
    "identity": ((1, 0, 0, 1), "RG BW"),
    "hflip": ((-1, 0, 0, 1), "GR WB"),
    "vflip": ((1, 0, 0, -1), "BW RG"),
    "turned by 180": ((-1, 0, 0, -1), "WB GR"),
    "clockwise": ((0, 1, -1, 0), "BR WG"),
    "counterclockwise": ((0, -1, 1, 0), "GW RB"),
    "transpose": ((0, 1, 1, 0), "RB GW"),
    "antitranspose": ((0, -1, -1, 0), "WG BR"),
}
COLOURS = {"R": (255, 0, 0), "G": (0, 255, 0), "B": (0, 0, 255), "W": (255, 255, 255)}


def place(path: Path, a: float, b: float, c: float, d: float) -> None:
    """Write a display matrix: what is stored at (x, y) is shown at (a x + c y, b x + d y)."""
    values = (a, b, 0, c, d, 0, 0, 0, 1 << 14)
    patch(path, b"tkhd", 40, struct.pack(">9i", *(round(value * (1 << 16)) for value in values)))


@pytest.mark.parametrize("name", MATRICES)
def test_a_picture_is_put_as_its_display_matrix_says(tmp_path: Path, name: str) -> None:
    path, ((a, b, c, d), shown) = tmp_path / "phone.mp4", MATRICES[name]
    pixels = np.array([[COLOURS[letter] for letter in row] for row in ("RG", "BW")], np.uint8)
    write_video(path, pixels.repeat(16, 0).repeat(32, 1)[None].repeat(3, 0), 8)
    place(path, a, b, c, d)
    height, width = (64, 32) if b else (32, 64)
    everything = read_all(path)[0]
    assert everything.shape == (3, height, width, 3)
    for frames in (everything, video.read_squashed(path, height, width), *video.iterate(path)):
        quarters = frames.reshape(-1, 2, height // 2, 2, width // 2, 3)[-1, :, 8, :, 8]
        expected = [[COLOURS[letter] for letter in row] for row in shown.split()]
        assert abs(quarters.astype(int) - expected).max() < 9
        assert frames.flags.c_contiguous, "torch takes no array that runs backwards"


def test_a_picture_that_leans_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    write_video(path, coloured(), 8)
    place(path, 0.9999, 0.0141, -0.0141, 0.9999)
    assert len(read_all(path)[0]) == 6, "less than a degree is none"
    place(path, 0.866, 0.5, -0.5, 0.866)
    with pytest.raises(ClipError, match=r"turned by -?30 degrees; expected a multiple of 90"):
        read_all(path)


# Colours of a standard picture, without those that BT.709 has at its edge.
STRIPES = np.array(
    [(255, 255, 255), (128, 128, 128), (220, 30, 30), (30, 220, 30), (40, 40, 220), (0, 0, 0)]
)


def in_hdr(nits: np.ndarray, transfer: int) -> np.ndarray:
    """Light of BT.709's primaries, (..., 3), as the signal of PQ or HLG in BT.2020, 0 to 1: the
    formulas of ITU-R BT.2087 and BT.2100, from light to signal."""
    to_bt2020 = [[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]]
    nits = nits @ np.array(to_bt2020).T
    if transfer == hdr.PQ:
        power = (nits / 10_000) ** 0.1593017578125
        return ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    luminance = np.maximum(nits @ [0.2627, 0.6780, 0.0593], 1e-9)[..., None] / 1000
    scene = nits / 1000 * luminance ** (1 / 1.2 - 1)
    high = 0.17883277 * np.log(np.maximum(12 * scene - 0.28466892, 1e-9)) + 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), high)


def write_hdr(path: Path, signal: np.ndarray, transfer: int, primaries: int = 9) -> None:
    """Stripes of 16 pixels as 10 bit video with the tags of its colours."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16 * len(signal), 32, "yuv420p10le"
        context = stream.codec_context
        context.colorspace, context.color_primaries, context.color_trc = 9, primaries, transfer
        context.color_range = 1
        pixels = np.round(signal * 65535).astype(np.uint16).repeat(16, 0)[None].repeat(32, 0)
        frame = av.VideoFrame.from_ndarray(pixels, format="rgb48le")
        frame = frame.reformat(
            format="yuv420p10le", dst_colorspace="BT2020", dst_color_range="MPEG"
        )
        container.mux([*stream.encode(frame), *stream.encode()])


@pytest.mark.parametrize("transfer", [hdr.PQ, hdr.HLG])
def test_hdr_looks_as_on_a_standard_display(tmp_path: Path, transfer: int) -> None:
    nits = 203 * (STRIPES / 255) ** 2.4
    write_hdr(tmp_path / "clip.mkv", in_hdr(nits, transfer), transfer)
    for frames in (
        read_all(tmp_path / "clip.mkv")[0],
        read_frames(tmp_path / "clip.mkv", 1, 32, 96),
        video.read_squashed(tmp_path / "clip.mkv", 32, 96),
    ):
        found = frames[0, 16, 8::16].astype(int)
        assert abs(found - STRIPES)[1:].max() <= 4
        assert 250 <= found[0].min() <= found[0].max() <= 253, "room is left for highlights"


def test_highlights_of_hdr_keep_their_order_and_hue() -> None:
    for transfer in (hdr.PQ, hdr.HLG):
        light = np.linspace(0, 900, 256)[:, None] * [1, 0.8, 0.5]
        signal = np.round(in_hdr(light, transfer) * 65535).astype(np.uint16)
        found = hdr.to_sdr(signal[None], transfer)[0].astype(int)
        assert (np.diff(found[:, 0]) >= 0).all() and found[-1, 0] == 255 and found[0, 0] == 0
        share = (found[60:] / found[60:, :1]) ** 2.4
        assert abs(share - [1, 0.8, 0.5]).max() < 0.03


def test_hdr_in_other_primaries_is_refused(tmp_path: Path) -> None:
    write_hdr(tmp_path / "clip.mkv", STRIPES / 255, hdr.PQ, primaries=12)
    with pytest.raises(ClipError, match="is HDR with primaries 12 and matrix 9; expected BT.2020"):
        read_all(tmp_path / "clip.mkv")


def write_avi(path: Path, codec: str, times: list[int], sound: bool = False) -> None:
    """Frames of noise at these places; the AVI fills what is between with empty chunks."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"bf": "2"})
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        audio = container.add_stream("pcm_s16le", rate=8000, layout="mono") if sound else None
        noise = np.random.default_rng(0).integers(0, 256, (len(times), 64, 96, 3), np.uint8)
        for time, pixels in zip(times, noise, strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = time
            container.mux(stream.encode(frame))
            if audio:
                beep = av.AudioFrame.from_ndarray(np.zeros((1, 320), np.int16), layout="mono")
                beep.rate, beep.pts = 8000, time * 320
                container.mux(audio.encode(beep))
        container.mux([*stream.encode(), *(audio.encode() if audio else [])])


GAPS = [0, *range(3, 13), *range(18, 28), *range(40, 49)]


@pytest.mark.parametrize("sound", [False, True])
@pytest.mark.parametrize("codec", ["mpeg4", "libx264"])
def test_empty_chunks_of_an_avi_are_no_missing_frames(
    tmp_path: Path, codec: str, sound: bool
) -> None:
    path = tmp_path / "clip.avi"
    write_avi(path, codec, GAPS, sound)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames >= 49
    assert len(read_all(path)[0]) == len(GAPS) == 30
    assert read_frames(path, 17, 64, 64).shape == (17, 64, 64, 3)
    content = path.read_bytes()
    for kept in (0.3, 0.6, 0.9, 0.99):
        path.write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(ClipError, match="the file is cut off or damaged"):
            read_all(path)
    middle = len(content) // 2
    path.write_bytes(content[:middle] + bytes(len(content) // 4) + content[middle * 3 // 2 :])
    with pytest.raises(ClipError, match="the file is cut off or damaged"):
        read_all(path)


def test_signs_for_no_frame_in_mpeg4_are_no_missing_frames(tmp_path: Path) -> None:
    """XviD drops a frame by a VOP that says "not coded", in a chunk that is not empty."""
    whole, path = tmp_path / "whole.avi", tmp_path / "clip.avi"
    write_avi(whole, "mpeg4", list(range(30)))
    with av.open(str(whole)) as source, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(source.streams.video[0])
        for number, packet in enumerate(source.demux(video=0)):
            if packet.dts is None:
                continue
            content = bytes(packet)
            at = content.index(b"\0\0\1\xb6") + 4
            head = int.from_bytes(content[at : at + 2])
            if number % 4 == 3 and head >> 14:  # Not a key frame.
                # Two bits of kind, no second over, a marker, five bits of time, a marker; then
                # "not coded" and stuffing.
                bare = av.Packet(content[at - 4 : at] + (head & 0xFFC0 | 0x0F).to_bytes(2))
                bare.pts, bare.dts, bare.time_base = packet.pts, packet.dts, packet.time_base
                packet = bare
            packet.stream = stream
            container.mux(packet)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 30
    assert 20 < len(read_all(path)[0]) < 26
    assert read_frames(path, 7, 64, 64).shape == (7, 64, 64, 3)


@pytest.mark.parametrize("read", [read_all, lambda path: read_frames(path, 4, 16, 16)])
class TestRefused:
    """Whatever is wrong with a file costs a ClipError, and says why."""

    def test_missing(self, tmp_path: Path, read) -> None:
        with pytest.raises(ClipError, match="does not exist"):
            read(tmp_path / "none.mp4")

    def test_folder(self, tmp_path: Path, read) -> None:
        with pytest.raises(ClipError, match="not a file"):
            read(tmp_path)

    def test_impossible_name(self, read) -> None:
        with pytest.raises(ClipError):
            read(Path("a\0b.mp4"))
        with pytest.raises(ClipError):
            read(Path("x" * 5000))

    @pytest.mark.parametrize("kind", ["pipe", "socket", "device"])
    def test_not_a_regular_file(self, tmp_path: Path, read, kind: str) -> None:
        path = special_file(tmp_path, kind)
        with pytest.raises(ClipError, match="is a pipe, a socket or a device, not a file"):
            read(path)

    def test_zero_length(self, tmp_path: Path, read) -> None:
        (tmp_path / "clip.mp4").touch()
        with pytest.raises(ClipError, match="is empty"):
            read(tmp_path / "clip.mp4")

    @pytest.mark.parametrize("content", [b"not a video\n" * 99, bytes(5000), b"\xff" * 5000])
    def test_other_content(self, tmp_path: Path, read, content: bytes) -> None:
        (tmp_path / "clip.mp4").write_bytes(content)
        with pytest.raises(ClipError, match="clip.mp4"):
            read(tmp_path / "clip.mp4")

    def test_sound_alone(self, tmp_path: Path, read) -> None:
        with av.open(str(tmp_path / "sound.mka"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
        with pytest.raises(ClipError, match="no video stream"):
            read(tmp_path / "sound.mka")

    @pytest.mark.parametrize("kept", [0.45, 0.8, 0.97])
    def test_truncated(self, tmp_path: Path, read, kept: float) -> None:
        write_video(tmp_path / "clip.mp4", coloured().repeat(5, 0), 8)
        content = (tmp_path / "clip.mp4").read_bytes()
        (tmp_path / "clip.mp4").write_bytes(content[: int(len(content) * kept)])
        with pytest.raises(ClipError, match=r"\d+ frames decode, but it announces 30"):
            read(tmp_path / "clip.mp4")

    @pytest.mark.parametrize(("first", "message"), [(20, r"[1-9]\d* frames"), (0, "0 frames")])
    def test_damaged_without_an_announced_number(
        self, tmp_path: Path, read, first: int, message: str
    ) -> None:
        path = tmp_path / "clip.mkv"
        write_unannounced(path, coloured().repeat(5, 0))
        with av.open(str(path)) as container:
            packets = [bytes(packet) for packet in container.demux(video=0)]
        content = path.read_bytes()
        for packet in filter(None, packets[first:]):
            content = content.replace(packet, bytes(len(packet)))
        path.write_bytes(content)
        with pytest.raises(ClipError, match=message + " decode; the file is cut off or damaged"):
            read(path)

    def test_header_alone(self, tmp_path: Path, read) -> None:
        path = tmp_path / "clip.mkv"
        write_unannounced(path, coloured())
        content = path.read_bytes()
        # Just behind the start of the first cluster, which would hold the frames.
        path.write_bytes(content[: content.index(b"\x1f\x43\xb6\x75") + 12])
        with pytest.raises(ClipError, match="0 frames decode"):
            read(path)

    def test_no_frame_decodes(self, tmp_path: Path, read) -> None:
        path = tmp_path / "clip.mp4"
        write_video(path, coloured(), 8)
        content = path.read_bytes()
        start = content.index(b"mdat") + 4
        path.write_bytes(content[:start] + bytes(len(content) - start))
        with pytest.raises(ClipError, match="0 frames decode"):
            read(path)

    def test_unknown_codec(self, tmp_path: Path, read) -> None:
        path = tmp_path / "clip.mp4"
        write_video(path, coloured(), 8)
        path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz").replace(b"avcC", b"zzzC"))
        with pytest.raises(ClipError, match="codec is unknown"):
            read(path)


def special_file(folder: Path, kind: str) -> Path:
    """What keeps a reader waiting, or never ends."""
    path = folder / "clip.mp4"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        # By a name of its own, since that of a temporary folder may be too long for a socket.
        bound = socket.socket(socket.AF_UNIX)
        with contextlib.chdir(folder):
            bound.bind(path.name)
    else:
        path.symlink_to("/dev/zero")
    return path


def read_everywhere(path: Path) -> Iterator[Callable[[], object]]:
    """Every way to open a video."""
    yield lambda: read_all(path)
    yield lambda: read_frames(path, 2, 16, 16)
    yield lambda: video.read_chosen(path, [0], 16, 16)
    yield lambda: video.read_squashed(path, 16, 16)
    yield lambda: list(video.iterate(path))
    yield lambda: video.read_shape(path)


PLAYLISTS = {
    "hls.m3u8": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n",
    "hls.mp4": "#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{clip}\n#EXT-X-ENDLIST\n",
    "list.ffconcat": "ffconcat version 1.0\nfile {clip}\n",
    "list.mp4": "ffconcat version 1.0\nfile {clip}\n",
    "session.sdp": "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\n"
    "m=video 5004 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "dash.mpd": '<?xml version="1.0"?><MPD xmlns="urn:mpeg:dash:schema:mpd:2011" type="static">'
    "<Period><AdaptationSet><Representation><BaseURL>{clip}</BaseURL></Representation>"
    "</AdaptationSet></Period></MPD>",
}


@pytest.mark.parametrize("name", PLAYLISTS)
def test_a_playlist_leads_nowhere(tmp_path: Path, name: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    write_video(tmp_path / "secret.mp4", coloured(), 8)
    (root / "secret.mp4").symlink_to(tmp_path / "secret.mp4")
    for clip in (tmp_path / "secret.mp4", "secret.mp4"):
        (root / name).write_text(PLAYLISTS[name].format(clip=clip))
        for read in read_everywhere(root / name):
            with pytest.raises(ClipError, match="not in a format of video|cannot be opened as"):
                read()


def test_one_module_opens_videos() -> None:
    package = Path(video.__file__).parents[1]
    opens = [path for path in package.rglob("*.py") if "av.open(" in path.read_text()]
    assert opens == [Path(video.__file__)]


def test_a_pattern_of_names_is_a_name(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    for name, level in {"a1.png": 10, "a2.png": 60, "a%d.png": 200, "b.jpg": 90}.items():
        image_module.new("RGB", (16, 16), (level,) * 3).save(tmp_path / name)
    assert read_all(tmp_path / "a%d.png")[0][:, 0, 0, 0].tolist() == [200]
    assert read_all(tmp_path / "b.jpg")[0][:, 0, 0, 0].tolist() == [90]
    with pytest.raises(ClipError, match="does not exist"):
        read_all(tmp_path / "b%d.jpg")


def test_a_shape_is_that_of_the_picture_as_it_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    write_video(path, coloured(), 8)
    assert video.read_shape(path) == (8.0, 6, 64, 96)
    place(path, 0, 1, -1, 0)
    assert video.read_shape(path) == (8.0, 6, 96, 64)


@pytest.mark.parametrize("position", [200, 900, 1500, 3000])
def test_flipped_bytes_cost_nothing_but_the_clip(tmp_path: Path, position: int) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, coloured(), 8)
    content = bytearray(path.read_bytes())
    for index in range(position, min(position + 64, len(content))):
        content[index] ^= 0xA5
    path.write_bytes(content)
    try:
        assert read_frames(path, 6, 64, 96).shape == (6, 64, 96, 3)
    except ClipError as error:
        assert str(path) in str(error)


@pytest.mark.parametrize("fps", [8, 29.97, Fraction(24000, 1001), 23.976])
def test_written_video_comes_back(tmp_path: Path, fps: float | Fraction) -> None:
    frames = coloured()
    write_video(tmp_path / "clip.mp4", frames, fps)
    back, rate = read_all(tmp_path / "clip.mp4")
    assert rate == pytest.approx(float(fps), abs=1e-3)
    assert back.shape == frames.shape and back.dtype == np.uint8
    middle = np.s_[:, 8::16, 8::16]
    assert abs(back[middle].astype(int) - frames[middle]).max() <= 8


def test_written_video_is_what_browsers_play(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, coloured(), 8)
    content = path.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        assert (context.name, context.pix_fmt) == ("h264", "yuv420p")
        assert (context.colorspace, context.color_range) == (1, 1)


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, coloured(), 8)
    write_video(tmp_path / "c.mp4", coloured()[::-1], 8)
    # Large enough for x264 to take several threads, which it notes in the stream.
    write_video(tmp_path / "d.mp4", numbered(2, 512, 512), 8)
    assert b" threads=1 " in (tmp_path / "d.mp4").read_bytes()
    assert b" mbtree=0 " in (tmp_path / "d.mp4").read_bytes()
    assert b"Lavf6" not in (tmp_path / "d.mp4").read_bytes()
    a, b, c = (file_digest(tmp_path / name) for name in ("a.mp4", "b.mp4", "c.mp4"))
    assert a == b != c


@pytest.mark.slow
def test_equal_clips_among_others_give_equal_bytes(tmp_path: Path) -> None:
    # What x264 read of memory that nobody had written hung on the clips before.
    digests: dict[int, set[str]] = {}
    for _ in range(8):
        for index in range(120):
            write_video(tmp_path / "clip.mp4", make_clip(77, index).frames, 8)
            digests.setdefault(index, set()).add(file_digest(tmp_path / "clip.mp4"))
    assert not [index for index, values in digests.items() if len(values) > 1]


@pytest.mark.parametrize(
    ("shape", "dtype", "fps", "crf", "reason"),
    [
        ((2, 31, 32, 3), np.uint8, 8, 12, "even height and width"),
        ((2, 32, 31, 3), np.uint8, 8, 12, "even height and width"),
        ((0, 32, 32, 3), np.uint8, 8, 12, "nothing to write"),
        ((2, 32, 32), np.uint8, 8, 12, "expected uint8"),
        ((2, 32, 32, 3), np.float32, 8, 12, "expected uint8"),
        ((2, 32, 32, 3), np.uint8, 0, 12, "fps is 0"),
        ((2, 32, 32, 3), np.uint8, float("nan"), 12, "fps is nan"),
        ((2, 32, 32, 3), np.uint8, 8, 52, "crf is 52"),
    ],
)
def test_unwritable_input_is_refused(tmp_path: Path, shape, dtype, fps, crf, reason) -> None:
    with pytest.raises(ValueError, match=reason):
        write_video(tmp_path / "clip.mp4", np.zeros(shape, dtype), fps, crf)
    assert not list(tmp_path.iterdir())


def test_interrupted_write_leaves_the_old_video(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, coloured(), 8)
    before = path.read_bytes()

    class Interrupted:
        @staticmethod
        def from_ndarray(*args, **kwargs):
            raise KeyboardInterrupt

    monkeypatch.setattr(video, "VideoFrame", Interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_video(path, coloured(), 8)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.name.startswith(".tmp-") and temporary.suffix == ".csv"
        temporary.write_text("new")
        assert not path.exists()
    assert path.read_text() == "new"
    with pytest.raises(RuntimeError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass
    assert path.read_text() == "new"


def test_atomic_write(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "ä\r\n")
    assert (tmp_path / "a").read_bytes() == b"\xc3\xa4\r\n"
    atomic_write(tmp_path / "a", b"\0")
    assert (tmp_path / "a").read_bytes() == b"\0"
    (tmp_path / "plain").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode
    digest = "6e340b9cffb37a989ca544e6bb780a2c78901d3fb33738768511a30617afa01d"
    assert file_digest(tmp_path / "a") == digest


def test_import_does_not_load_torch() -> None:
    code = "import sys, videorepa.data.video; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_published_clips() -> None:
    paths = sorted(CLIPS.glob("*.mp4"))
    if not paths:
        pytest.skip(f"the published clips are not at {CLIPS}")
    assert len(paths) == 12
    everything, fps = read_all(paths[0])
    assert (everything.shape, fps) == ((49, 480, 720, 3), 8.0)
    assert np.array_equal(read_frames(paths[0], 49, 480, 720), everything)
    # One of each prompt: all twelve would take longer than everything else here.
    for path in paths[:4]:
        small = read_frames(path, 2, 24, 36)
        assert small.shape == (2, 24, 36, 3)
        assert small.std() > 5, path
