"""Reading videos: containers, pixel formats, colours and frame rates, whole and in parts."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from clips import counter, encode, numbers, psnr, smooth

from stem.video import VideoError, crop_to_multiple, open_video, read_video, write_video


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
    [
        (1, 1, (63, 102, 240)),
        (6, 1, (81, 90, 240)),
        (2, 0, (81, 90, 240)),
        (5, 2, (76, 85, 255)),
        (7, 1, (62, 102, 240)),
        (9, 1, (74, 97, 240)),
    ],
)
def test_red_stays_red(
    tmp_path: Path, colorspace: int, color_range: int, yuv: tuple[int, int, int]
) -> None:
    path = encode_plain(tmp_path / "red.mp4", colorspace, color_range, yuv, 32)
    assert_red(read_video(path).frames)


@pytest.mark.parametrize(("lines", "yuv"), [(704, (81, 90, 240)), (720, (63, 102, 240))])
def test_large_untagged_video_is_read_as_players_read_it(
    tmp_path: Path, lines: int, yuv: tuple[int, int, int]
) -> None:
    assert_red(read_video(encode_plain(tmp_path / "red.mp4", 2, 0, yuv, lines)).frames)


def test_a_matrix_that_cannot_be_read(tmp_path: Path) -> None:
    path = encode_plain(tmp_path / "red.mp4", 8, 1, (81, 90, 240), 32)
    with pytest.raises(VideoError, match=r"red.mp4: the colours are stored by matrix 8 of"):
        read_video(path)


def assert_red(frames: torch.Tensor) -> None:
    colour = frames.float().mean((0, 1, 2))
    assert (colour - torch.tensor([255.0, 0.0, 0.0])).abs().max() < 5


def encode_plain(
    path: Path, colorspace: int, color_range: int, yuv: tuple[int, int, int], height: int
) -> Path:
    """A frame of one colour, with tags of one's own."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=5, options={"crf": "1"})
        stream.width, stream.height = 32, height
        stream.pix_fmt = "yuv420p"
        stream.codec_context.colorspace = colorspace
        stream.codec_context.color_range = color_range
        frame = av.VideoFrame(32, height, "yuv420p")
        frame.colorspace, frame.color_range = colorspace, color_range
        for plane, level in zip(frame.planes, yuv, strict=True):
            plane.update(bytes([level]) * plane.buffer_size)
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_colour_of_420_video_is_interpolated(tmp_path: Path) -> None:
    frames = smooth(2)
    path = encode(tmp_path / "clip.mkv", frames, pix_fmt="yuv420p")
    assert psnr(read_video(path).frames, frames) > 45


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
