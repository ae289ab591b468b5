"""Reading and writing videos, on small files made by the tests."""

from __future__ import annotations

import ctypes
import os
import wave
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stem.video import (
    FrameRange,
    Video,
    VideoError,
    check_video_output,
    crop_to_multiple,
    open_video,
    read_video,
    reading,
    write_video,
)
from stem.video.writing import most_bytes

STEP = 8  # grey levels between neighbouring frames of `counter`


def smooth(n: int = 6, height: int = 48, width: int = 64, detail: float = 1) -> torch.Tensor:
    """Moving gradients, which 4:2:0 video can hold well."""
    t, y, x = np.mgrid[:n, :height, :width]
    x, y = x * detail, y * detail
    waves = [np.sin(x / 16 + t / 3), np.cos(y / 14 - t / 4), np.sin((x + y) / 21 + t / 5)]
    return torch.from_numpy(np.stack([127.5 + 110 * wave for wave in waves], -1).astype(np.uint8))


def noise(n: int, height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, height, width, 3), dtype=torch.uint8, generator=generator)


def counter(n: int) -> torch.Tensor:
    """Grey frames whose level tells their number."""
    return (STEP * torch.arange(n, dtype=torch.uint8)).view(n, 1, 1, 1).expand(n, 16, 16, 3)


def numbers(video: Video) -> list[int]:
    return [round(level / STEP) for level in video.frames.float().mean((1, 2, 3)).tolist()]


def encode(
    path: Path,
    frames: torch.Tensor,
    codec: str = "ffv1",
    pix_fmt: str = "bgr0",
    rate: Fraction | int = 24,
    muxer: dict[str, str] | None = None,
    options: dict[str, str] | None = None,
    **context: Any,
) -> Path:
    """Write frames with PyAV alone; FFV1 in bgr0 keeps every pixel."""
    with av.open(str(path), "w", options=muxer or {}) as container:
        stream = container.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pix_fmt
        for name, value in context.items():
            setattr(stream.codec_context, name, value)
        for index, picture in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")
            frame = frame.reformat(format=pix_fmt)
            frame.pts, frame.time_base = index, 1 / Fraction(rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode_at(path: Path, stamps: list[int], tick: Fraction) -> Path:
    """Frames at times of one's own, in ticks."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"bf": "0"})
        stream.width = stream.height = 16
        stream.time_base = tick
        for stamp, picture in zip(stamps, counter(len(stamps)), strict=True):
            frame = av.VideoFrame.from_ndarray(picture.contiguous().numpy(), format="rgb24")
            frame.pts, frame.time_base = stamp, tick
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode_early_header(path: Path, frames: torch.Tensor) -> Path:
    """H.264 whose index comes first, so that the file opens even when its end is lost."""
    return encode(path, frames, "libx264", "yuv420p", muxer={"movflags": "faststart"})


def packet_ends(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    error = (a.double() - b.double()).pow(2).mean().item()
    return float(10 * np.log10(255**2 / error))


# Frame ranges


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("16", FrameRange(0, 16, 1)),
        ("8:40", FrameRange(8, 40, 1)),
        ("8:40:2", FrameRange(8, 40, 2)),
        (":16", FrameRange(0, 16, 1)),
        ("10:", FrameRange(10, None, 1)),
        ("::4", FrameRange(0, None, 4)),
        (" 3:9 ", FrameRange(3, 9, 1)),
    ],
)
def test_range_forms(text: str, expected: FrameRange) -> None:
    assert FrameRange.parse(text) == expected


@given(st.integers(0, 10**6), st.none() | st.integers(1, 10**6), st.integers(1, 10**4))
def test_range_text_round_trip(start: int, length: int | None, stride: int) -> None:
    asked = FrameRange(start, None if length is None else start + length, stride)
    assert FrameRange.parse(str(asked)) == asked


@pytest.mark.parametrize(
    "text", ["", "x", "-3", "1:-2", "3-5", "1:2:3:4", "0", "5:5", "9:4", "::0", "1.5", "٣"]
)
def test_range_errors_name_the_text_and_the_forms(text: str) -> None:
    with pytest.raises(VideoError) as caught:
        FrameRange.parse(text)
    assert repr(text) in str(caught.value)
    assert '"8:40:2"' in str(caught.value)


@pytest.mark.parametrize("parts", [(-1, None, 1), (0, None, 0), (4, 4, 1)])
def test_range_rejects_impossible_numbers(parts: tuple[int, int | None, int]) -> None:
    with pytest.raises(VideoError, match="start"):
        FrameRange(*parts)


@pytest.mark.parametrize("text", ["5", "3:9", "3:9:2", ":12", "7:", "::5", "2:12:3", "0:12:12"])
def test_range_and_stride_keep_the_right_frames(tmp_path: Path, text: str) -> None:
    path = encode(tmp_path / "clip.mkv", counter(12))
    asked = FrameRange.parse(text)
    result = read_video(path, frames=text)
    assert numbers(result) == list(range(12))[asked.start : asked.stop : asked.stride]
    assert result.fps == Fraction(24, asked.stride)
    assert torch.equal(result.frames, read_video(path, frames=asked).frames)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("100:120", "100:120, the file has 12; use a start below 12"),
        ("20:", "20:, the file has 12; use a start below 12"),
        ("8:40", "8:40, the file has 12; use a stop of at most 12"),
        ("13", "0:13, the file has 12; use a stop of at most 12"),
        ("0:14:13", "0:14:13, the file has 12"),
    ],
)
def test_range_past_the_end(tmp_path: Path, text: str, said: str) -> None:
    path = encode(tmp_path / "clip.mkv", counter(12))
    with pytest.raises(VideoError) as caught:
        read_video(path, frames=text)
    assert f"{path}: asked for frames {said}" in str(caught.value)


# Round trips and formats


@pytest.mark.parametrize(
    "fps", [Fraction(24000, 1001), Fraction(30000, 1001), Fraction(15, 7), Fraction(25), 12.5, 8]
)
@pytest.mark.parametrize("n", [1, 5])
def test_round_trip(tmp_path: Path, fps: Fraction | float, n: int) -> None:
    frames = smooth(n)
    path = tmp_path / "made" / "for it" / "clip.mp4"
    write_video(path, frames, fps)
    result = read_video(path)
    assert result.frames.dtype == torch.uint8
    assert result.frames.shape == frames.shape
    assert result.fps == Fraction(fps)
    assert isinstance(result.fps, Fraction)
    assert result.notes == ()
    assert psnr(result.frames, frames) > 40
    result.frames[0, 0, 0] = 0  # the memory is the caller's own


def test_float_rate_finds_the_broadcast_fraction(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth(2), 23.976023976)
    assert read_video(tmp_path / "clip.mp4").fps == Fraction(24000, 1001)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "limit"),
    [
        ("clip.mkv", "libx264", "yuv420p", 30),
        ("clip.mov", "mpeg4", "yuv420p", 28),
        ("clip.gif", "gif", "rgb8", 15),
        ("clip.mkv", "ffv1", "yuv420p10le", 38),
        ("clip.mkv", "ffv1", "bgra", 100),
        ("clip.mkv", "ffv1", "yuv444p", 40),
    ],
)
def test_other_containers_and_pixel_formats(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, limit: float
) -> None:
    frames = smooth(7)
    path = encode(tmp_path / name, frames, codec, pix_fmt, rate=10)
    result = read_video(path)
    assert result.fps == 10
    assert result.frames.shape == frames.shape
    error = (result.frames.double() - frames.double()).pow(2).mean()
    assert error <= 255**2 / 10 ** (limit / 10)


@pytest.mark.parametrize("pix_fmt", ["gray", "gray16le"])
def test_grey_video(tmp_path: Path, pix_fmt: str) -> None:
    result = read_video(encode(tmp_path / "clip.mkv", counter(5), pix_fmt=pix_fmt))
    assert numbers(result) == list(range(5))


@pytest.mark.parametrize(
    ("colorspace", "color_range", "yuv"),
    [(1, 1, (63, 102, 240)), (6, 1, (81, 90, 240)), (2, 0, (81, 90, 240)), (5, 2, (76, 85, 255))],
)
def test_red_stays_red(
    tmp_path: Path, colorspace: int, color_range: int, yuv: tuple[int, int, int]
) -> None:
    path = tmp_path / "red.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "1"})
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = colorspace
        stream.codec_context.color_range = color_range
        frame = av.VideoFrame(32, 32, "yuv420p")
        frame.colorspace, frame.color_range = colorspace, color_range
        for plane, level in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    colour = read_video(path).frames.float().mean((0, 1, 2))
    assert (colour - torch.tensor([255.0, 0.0, 0.0])).abs().max() < 5


def test_colour_of_420_video_is_interpolated(tmp_path: Path) -> None:
    frames = smooth(2)
    path = encode(tmp_path / "clip.mkv", frames, pix_fmt="yuv420p")
    assert psnr(read_video(path).frames, frames) > 45


# Frame rates


@pytest.mark.parametrize("name", ["clip.mp4", "clip.mkv", "clip.gif"])
@pytest.mark.parametrize("rate", [25, 30, Fraction(24000, 1001), Fraction(30000, 1001), 15])
def test_a_constant_rate_does_not_vary_by_rounding(
    tmp_path: Path, name: str, rate: Fraction | int
) -> None:
    """MKV's clock ticks every millisecond, GIF's every ten."""
    codec, pixels = ("gif", "rgb8") if name.endswith("gif") else ("libx264", "yuv420p")
    path = encode(tmp_path / name, counter(31), codec, pixels, rate)
    for frames in (None, "4:9", "1::3"):
        assert not any("varies" in note for note in read_video(path, frames=frames).notes)


def test_a_rate_that_varies_is_said(tmp_path: Path) -> None:
    tick = Fraction(1, 1000)
    jitter = encode_at(tmp_path / "jitter.mkv", [0, 41, 80, 119, 161, 200], tick)
    assert read_video(jitter).notes == ()
    (note,) = read_video(encode_at(tmp_path / "a.mp4", [0, 40, 80, 160, 200, 240], tick)).notes
    assert note.startswith("the frame rate varies: frames are 40.0 to 80.0 ms apart, and were")
    halves = encode_at(tmp_path / "b.mp4", [*range(0, 400, 40), *range(400, 1200, 80)], tick)
    assert "varies" in read_video(halves).notes[0]
    (note,) = read_video(halves, frames="10:20").notes
    assert note.startswith("the frames come at 12.5 a second, and were taken as 17")


# Sizes


def test_crop_to_multiples_is_centred_and_said(tmp_path: Path) -> None:
    frames = noise(2, 22, 38)
    path = encode(tmp_path / "clip.mkv", frames)
    result = read_video(path)
    assert torch.equal(result.frames, frames[:, 3:19, 3:35])
    assert result.notes == (
        "38x22 was centre-cropped to 32x16, because width and height must be multiples of 8",
    )
    assert torch.equal(read_video(path, multiple_of=2).frames, frames)
    assert read_video(path, multiple_of=16).frames.shape == (2, 16, 32, 3)


@pytest.mark.parametrize(
    ("size", "shape", "said"),
    [
        (None, (48, 64), []),
        (48, (48, 64), []),
        ("24", (24, 32), ["64x48 was resized to 32x24"]),
        (24, (24, 32), ["64x48 was resized to 32x24"]),
        (
            28,
            (24, 32),
            ["64x48 was resized to 37x28", "37x28 was centre-cropped to 32x24, because"],
        ),
        (96, (96, 128), ["64x48 was resized to 128x96"]),
        ((64, 48), (48, 64), []),
        ((32, 32), (32, 32), ["to 43x32, to give", "43x32 was centre-cropped to 32x32, the size"]),
        ("64x32", (32, 64), ["64x48 was centre-cropped to 64x32, the size asked for"]),
        (
            "72x20",
            (16, 72),
            ["to 72x54", "to 72x20, the size", "72x20 was centre-cropped to 72x16"],
        ),
    ],
)
def test_sizes(
    tmp_path: Path,
    size: int | tuple[int, int] | str | None,
    shape: tuple[int, int],
    said: list[str],
) -> None:
    result = read_video(encode(tmp_path / "clip.mkv", smooth(2)), size=size)
    assert tuple(result.frames.shape) == (2, *shape, 3)
    assert len(result.notes) == len(said)
    assert all(part in note for part, note in zip(said, result.notes, strict=True))


def test_cover_keeps_the_aspect_and_the_centre(tmp_path: Path) -> None:
    ramp = torch.arange(64, dtype=torch.uint8).mul(3).view(1, 1, 64, 1).expand(1, 32, 64, 3)
    path = encode(tmp_path / "clip.mkv", ramp)
    cut = read_video(path, size=(32, 32)).frames
    assert torch.equal(cut, ramp[:, :, 16:48])
    half = read_video(path, size="16x16").frames.float()
    expected = ramp[:, ::2, 16:48].float().unflatten(2, (16, 2)).mean(3)
    assert (half - expected).abs().max() <= 2


def test_sizes_past_any_memory(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv", noise(1, 16, 64))
    for size in ("1000000", 1_000_000, "8x9000"):
        with pytest.raises(VideoError, match="8192 pixels a side are the most") as caught:
            read_video(path, size=size)
        assert repr(size) in str(caught.value)
    with pytest.raises(VideoError, match=r"clip.mkv: its 64x16 would become 16000x4000; 8192"):
        read_video(path, size=4000)
    assert read_video(path, size="8x8").frames.shape == (1, 8, 8, 3)


def test_a_video_is_cropped_later(tmp_path: Path) -> None:
    """What a model's VAE takes is known when it is loaded, and a video is read before."""
    path = encode(tmp_path / "my clip.mkv", noise(2, 22, 38))
    whole, at_once = read_video(path, multiple_of=1), read_video(path, multiple_of=8)
    assert whole.name == at_once.name == "my clip"
    later = crop_to_multiple(whole, 8)
    assert torch.equal(later.frames, at_once.frames)
    assert (later.notes, later.fps, later.name) == (at_once.notes, at_once.fps, "my clip")
    assert crop_to_multiple(later, 8) is later
    with pytest.raises(VideoError, match="pictures of 38x22 are smaller"):
        crop_to_multiple(whole, 32)


@pytest.mark.parametrize("size", [0, -8, "", "big", "8x", "8x0", (8,), (8, 8, 8), (8.0, 8), "8,8"])
def test_sizes_that_mean_nothing(tmp_path: Path, size: Any) -> None:
    path = encode(tmp_path / "clip.mkv", smooth(1))
    with pytest.raises(VideoError, match='"512x320"') as caught:
        read_video(path, size=size)
    assert repr(size) in str(caught.value)


def test_pictures_smaller_than_the_multiple(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mkv", noise(1, 6, 40))
    with pytest.raises(VideoError, match=r"clip.mkv: pictures of 40x6 .* of 8;"):
        read_video(path)
    with pytest.raises(VideoError, match=r"47x7 .* of 8;"):
        read_video(path, size=7)
    assert read_video(path, size=8).frames.shape == (1, 8, 48, 3)
    with pytest.raises(VideoError, match="multiple_of"):
        read_video(path, multiple_of=0)


# Orientation and pixel shape

# As the MP4 file stores them: (a, b, c, d) shows the point (x, y) at (a x + c y, b x + d y),
# with x to the right and y down. The first is what a phone held upright writes.
ORIENTATIONS = {
    "clockwise": ((0, 1, -1, 0), lambda p: np.rot90(p, -1, (1, 2))),
    "anticlockwise": ((0, -1, 1, 0), lambda p: np.rot90(p, 1, (1, 2))),
    "upside down": ((-1, 0, 0, -1), lambda p: np.rot90(p, 2, (1, 2))),
    "mirrored": ((-1, 0, 0, 1), lambda p: p[:, :, ::-1]),
    "transposed": ((0, 1, 1, 0), lambda p: p.swapaxes(1, 2)),
}


def set_display_matrix(path: Path, matrix: tuple[int, int, int, int]) -> None:
    a, b, c, d = (value << 16 for value in matrix)
    content = bytearray(path.read_bytes())
    where = content.index(b"tkhd") + 44  # the matrix of a version 0 track header
    content[where : where + 36] = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4").tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("name", ORIENTATIONS)
def test_pictures_are_turned_upright(tmp_path: Path, name: str) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth(3, 48, 80), 10)
    stored = read_video(path).frames.numpy()
    matrix, turn = ORIENTATIONS[name]
    set_display_matrix(path, matrix)
    result = read_video(path)
    assert np.array_equal(result.frames.numpy(), turn(stored))
    assert len(result.notes) == 1
    assert "turned upright" in result.notes[0]


def test_resize_uses_the_upright_size(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth(2, 48, 80), 10)
    wide = read_video(path, size=(40, 24)).frames.numpy()
    matrix, turn = ORIENTATIONS["clockwise"]
    set_display_matrix(path, matrix)
    result = read_video(path, size=(24, 40))
    assert np.array_equal(result.frames.numpy(), turn(wide))
    assert result.notes[1] == "48x80 was resized to 24x40, to give the size asked for"
    assert read_video(path, size=(32, 16)).frames.shape == (2, 16, 32, 3)


def test_pixels_that_are_not_square_are_said(tmp_path: Path) -> None:
    frames = smooth(2)
    aspect = Fraction(4, 3)
    path = encode(tmp_path / "clip.mp4", frames, "mpeg4", "yuv420p", sample_aspect_ratio=aspect)
    result = read_video(path)
    assert result.frames.shape == frames.shape
    assert result.notes == ("the pixels are not square (4:3) and were read as if they were",)


# Files that cannot be used


@pytest.mark.parametrize("content", [b"", np.random.default_rng(0).bytes(5000)])
def test_not_a_video(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "clip.mp4"
    path.write_bytes(content)
    with pytest.raises(
        VideoError, match=f"clip.mp4: cannot be read.*{len(content)} bytes"
    ) as caught:
        read_video(path)
    assert isinstance(caught.value.__cause__, av.FFmpegError)


def test_absent_file_and_folder(tmp_path: Path) -> None:
    for path, said in ((tmp_path / "absent.mp4", "no such file"), (tmp_path, "is a folder; name")):
        with pytest.raises(VideoError) as caught:
            read_video(path)
        assert f"{path}: {said}" in str(caught.value)


def test_sound_only(tmp_path: Path) -> None:
    path = tmp_path / "sound.wav"
    with wave.open(str(path), "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(8000)
        sound.writeframes(bytes(1600))
    with pytest.raises(VideoError, match=r"sound.wav: has no video stream"):
        read_video(path)


def test_file_without_its_index(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth(), 10)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(VideoError, match=r"clip.mp4: cannot be read as a video"):
        read_video(path)


def test_damage_is_an_error_only_where_it_is_asked_for(tmp_path: Path) -> None:
    path = encode_early_header(tmp_path / "clip.mp4", noise(12, 48, 64))
    whole = read_video(path).frames
    path.write_bytes(path.read_bytes()[: packet_ends(path)[8] - 100])
    with pytest.raises(VideoError, match=r"clip.mp4: damaged, only [4-9] frames") as caught:
        read_video(path)
    assert isinstance(caught.value.__cause__, av.FFmpegError)
    assert torch.equal(read_video(path, frames="4").frames, whole[:4])


def test_frames_missing_at_the_end_are_said(tmp_path: Path) -> None:
    path = encode_early_header(tmp_path / "clip.mp4", noise(12, 48, 64))
    path.write_bytes(path.read_bytes()[: packet_ends(path)[8]])
    result = read_video(path)
    assert len(result.frames) == 9
    assert result.notes == ("the file announces 12 frames, and only 9 came out",)


def test_frames_decoded_with_damage_are_said(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.avi", noise(12, 48, 64), "mpeg4", "yuv420p")
    assert read_video(path).notes == ()
    content = bytearray(path.read_bytes())
    for tenths in (3, 5, 7):
        where = len(content) * tenths // 10
        content[where : where + 40] = np.random.default_rng(tenths).bytes(40)
    path.write_bytes(content)
    result = read_video(path)
    assert len(result.frames) == 12
    assert result.notes == ("frames damaged in the file, used as far as they could be decoded: 3",)


def test_no_frame_at_all(tmp_path: Path) -> None:
    path = encode_early_header(tmp_path / "clip.mp4", smooth())
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4])
    with pytest.raises(VideoError, match=r"clip.mp4: (no|damaged, only 0) frame"):
        read_video(path)


def test_codec_without_a_decoder(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth(), 10)
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    with pytest.raises(VideoError, match=r"clip.mp4: .*no decoder"):
        read_video(path)


def test_no_frame_rate(tmp_path: Path) -> None:
    """With a stub: FFmpeg finds some rate for every file that the tests can make."""
    stream = SimpleNamespace(codec_context=object(), average_rate=None, guessed_rate=None)
    container: Any = SimpleNamespace(streams=SimpleNamespace(video=[stream]))
    path = tmp_path / "clip.mp4"
    path.touch()
    reader = reading._Reader(path, FrameRange(), None, 8)
    with pytest.raises(VideoError, match=r"clip.mp4: states no frame rate"):
        next(reader._read(container))


@pytest.mark.parametrize("frames", [None, "2:11:2"])
@pytest.mark.parametrize("size", [None, (24, 20)])
def test_a_video_file_gives_the_frames_that_reading_gives(
    tmp_path: Path, frames: str | None, size: tuple[int, int] | None
) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth(12), 10)
    whole = read_video(path, frames=frames, size=size, multiple_of=2)
    opened = open_video(path, frames=frames, size=size, multiple_of=2)
    assert (opened.num_frames, opened.height, opened.width) == tuple(whole.frames.shape[:3])
    assert (opened.fps, opened.notes, opened.name) == (whole.fps, whole.notes, whole.name)
    for count in (1, 4, 100):
        for video in (whole, opened):
            parts = list(video.parts(count))
            assert {len(part) for part in parts[:-1]} <= {count}
            assert torch.equal(torch.cat(parts), whole.frames)
    cropped = crop_to_multiple(opened, 16)
    assert torch.equal(torch.cat(list(cropped.parts(3))), crop_to_multiple(whole, 16).frames)
    assert cropped.notes == crop_to_multiple(whole, 16).notes


def test_a_video_file_that_changes_is_said(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth(), 10)
    opened = open_video(path)
    write_video(path, smooth()[:-1], 10)
    with pytest.raises(VideoError, match="has changed since it was opened"):
        list(opened.parts(4))
    with pytest.raises(VideoError, match="asked for frames 0:99, the file has"):
        open_video(path, frames="0:99")


def test_parts_are_written_as_the_whole_is(tmp_path: Path) -> None:
    frames = smooth()
    write_video(tmp_path / "whole.mp4", frames, 10)
    write_video(tmp_path / "parts.mp4", iter(frames.split(5)), 10)
    assert (tmp_path / "whole.mp4").read_bytes() == (tmp_path / "parts.mp4").read_bytes()
    with pytest.raises(ValueError, match="frames is empty"):
        write_video(tmp_path / "none.mp4", iter([]), 10)
    with pytest.raises(ValueError, match="the frames change their size"):
        write_video(tmp_path / "two.mp4", iter([frames, frames[:, :-2]]), 10)
    with pytest.raises(ValueError, match="frames must be uint8"):
        write_video(tmp_path / "float.mp4", iter([frames, frames.float()]), 10)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["parts.mp4", "whole.mp4"]


# Writing


def test_what_memory_held_before_is_not_in_the_file(tmp_path: Path) -> None:
    libc, perturb = ctypes.CDLL(None), -6  # M_PERTURB: the byte that malloc fills memory with
    if not hasattr(libc, "mallopt"):
        pytest.skip("needs glibc")
    path, found = tmp_path / "clip.mp4", set()
    try:
        for byte in (1, 170):
            libc.mallopt(perturb, byte)
            write_video(path, smooth(12, 64, 64), 10)
            found.add(path.read_bytes())
    finally:
        libc.mallopt(perturb, 0)
    assert len(found) == 1


def test_odd_sizes_are_padded_by_the_edge(tmp_path: Path) -> None:
    frames = smooth(2, 33, 47)
    write_video(tmp_path / "clip.mp4", frames, 10)
    result = read_video(tmp_path / "clip.mp4", multiple_of=1)
    assert result.frames.shape == (2, 34, 48, 3)
    padded = np.pad(frames.numpy(), ((0, 0), (0, 1), (0, 1), (0, 0)), mode="edge")
    assert psnr(result.frames, torch.from_numpy(padded)) > 38


def test_written_colours_are_tagged_as_converted(tmp_path: Path) -> None:
    write_video(tmp_path / "clip.mp4", smooth(1), 10)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        frame = next(container.decode(video=0))
    assert (frame.colorspace, frame.color_range) == (6, 1)  # BT.601, limited range


def test_written_colour_stays_in_place(tmp_path: Path) -> None:
    """PyAV from 17 on reads chroma where the file says it lies, so the file must say the truth."""
    frames = smooth(5, detail=1.8)
    write_video(tmp_path / "clip.mp4", frames, 10)
    assert psnr(read_video(tmp_path / "clip.mp4").frames, frames) > 41


def test_strided_frames_are_written_as_they_look(tmp_path: Path) -> None:
    frames = smooth(3, 64, 48).transpose(1, 2).flip(0)
    write_video(tmp_path / "clip.mp4", frames, 10)
    assert psnr(read_video(tmp_path / "clip.mp4").frames, frames) > 40


@pytest.mark.parametrize(
    ("frames", "said"),
    [
        (torch.zeros(2, 8, 8, 3), r"float32 \[2, 8, 8, 3\]"),
        (torch.zeros(8, 8, 3, dtype=torch.uint8), r"uint8 \[8, 8, 3\]"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), r"uint8 \[2, 3, 8, 8\]"),
        (torch.zeros(0, 8, 8, 3, dtype=torch.uint8), r"uint8 \[0, 8, 8, 3\]"),
    ],
)
def test_frames_that_cannot_be_written(tmp_path: Path, frames: torch.Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        write_video(tmp_path / "clip.mp4", frames, 10)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fps", [0, -1, float("nan"), float("inf"), Fraction(1, 10**6)])
def test_rates_that_cannot_be_written(tmp_path: Path, fps: Fraction | float) -> None:
    with pytest.raises(ValueError, match="fps"):
        write_video(tmp_path / "clip.mp4", smooth(1), fps)


def test_arguments_of_other_types_are_named(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.mp4", smooth(2)
    write_video(path, frames, 10)
    wrong: Any
    for wrong in (4, (0, 4)):
        with pytest.raises(TypeError, match="pass a FrameRange or its text, such as '16'"):
            read_video(path, frames=wrong)
    for wrong, said in (
        (read_video(path), "frames is a Video; pass tensors, such as video.frames"),
        (frames.numpy(), "frames holds a ndarray; pass a tensor, such as torch.from_numpy"),
        ([[1, 2]], "frames holds a list; pass a tensor"),
    ):
        with pytest.raises(TypeError, match=said):
            write_video(path, wrong, 10)
    wrong = "10"
    with pytest.raises(TypeError, match=r"fps is '10'; pass a number, such as video.fps"):
        write_video(path, frames, wrong)


def test_only_mp4_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"clip.gif.*\.mp4"):
        write_video(tmp_path / "clip.gif", smooth(1), 10)


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, smooth(2), 10)
    before = path.read_bytes()
    seen: list[bytes] = []

    def fail(*_: object) -> None:
        seen.append(path.read_bytes())
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space left"):
        write_video(path, smooth(5), 10)
    assert seen == [before]
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_noise_takes_no_more_space_than_is_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "clip.mp4"
    write_video(path, noise(4, 64, 64), 8)
    assert 4 * 64 * 64 < path.stat().st_size <= most_bytes(4, 64, 64)


def test_an_output_is_refused_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_video_output(tmp_path / "to come" / "clip.mp4", 16, 64, 64)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match=r"clip.gif: only MP4 is written"):
        check_video_output(tmp_path / "clip.gif", 16, 64, 64)
    (tmp_path / "folder.mp4").mkdir()
    with pytest.raises(IsADirectoryError, match=r"folder.mp4 is a folder; name a file in it"):
        check_video_output(tmp_path / "folder.mp4", 16, 64, 64)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"file is a file, not a folder"):
        check_video_output(tmp_path / "file" / "clip.mp4", 16, 64, 64)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"clip.mp4 needs 86,016 bytes, and 1,000 are free"):
        check_video_output(tmp_path / "clip.mp4", 16, 64, 64)
