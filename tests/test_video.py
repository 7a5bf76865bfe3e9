"""Sampling, refusing and writing videos."""

from __future__ import annotations

import struct
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from videorepa.data import video
from videorepa.data.video import read_all, read_frames, write_video
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
    monkeypatch.setattr(video, "_announced", lambda container, stream: 10)
    assert numbers(read_frames(numbered_files[61], 10, 32, 48)) == list(range(0, 60, 6))


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
    assert (video._fit(image, 40, 40) == 200).all()
    assert (video._fit(image, 20, 20) == 200).all()
    assert (video._fit(image.transpose(1, 0, 2), 20, 20) == 200).all()
    assert not (video._fit(image, 20, 22) == 200).all()


def test_shrinking_uses_antialias_and_rounds() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, 1::4] = 255
    # A quarter of 255 is 63.75. Without antialias two columns of four would count: 127.5.
    assert (video._fit(stripes, 16, 16)[:, 1:-1] == 64).all()
    constant = np.full((50, 70, 3), 77, np.uint8)
    assert (video._fit(constant, 33, 21) == 77).all()


def test_scaled_values_agree_with_pillow() -> None:
    image_module = pytest.importorskip("PIL.Image")
    pixels = np.random.default_rng(1).integers(0, 256, (60, 90, 3), np.uint8)
    expected = image_module.fromarray(pixels).resize((36, 24), image_module.Resampling.BILINEAR)
    assert abs(video._fit(pixels, 24, 36).astype(int) - np.asarray(expected, int)).max() <= 1


@pytest.mark.parametrize("size", [(0, 8, 8), (4, 0, 8), (4, 8, -1)])
def test_impossible_target_is_refused(tmp_path: Path, size: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match="expected 1 or more"):
        read_frames(tmp_path / "any.mp4", *size)


def test_turned_video_stands_upright(tmp_path: Path) -> None:
    path = tmp_path / "phone.mp4"
    pixels = np.zeros((3, 32, 64, 3), np.uint8)
    pixels[:, :, :32] = 255
    write_video(path, pixels, 8)
    # A quarter turn clockwise: what was on the left is then on top.
    matrix = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    patch(path, b"tkhd", 40, matrix)
    upright, _ = read_all(path)
    assert upright.shape == (3, 64, 32, 3)
    assert upright[:, :28].min() > 240 and upright[:, 36:].max() < 15


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
        with av.open(str(tmp_path / "sound.wav"), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            frame.rate = 8000
            container.mux(stream.encode(frame))
        with pytest.raises(ClipError, match="no video stream"):
            read(tmp_path / "sound.wav")

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
