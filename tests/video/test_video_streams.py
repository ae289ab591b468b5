"""Which stream of a file is the video, and at which rate: covers, several videos, stills."""

from __future__ import annotations

import io
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import counter, encode, noise, numbers, smooth
from PIL import Image

from stem.video import VideoError, open_video, read_video


def box(kind: bytes, *parts: bytes) -> bytes:
    content = b"".join(parts)
    return struct.pack(">I", 8 + len(content)) + kind + content


def add_cover(path: Path) -> Path:
    """Put a cover before the streams of an MP4 file, as music shops and phones do."""
    picture = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(picture, "png")
    data = box(b"data", struct.pack(">II", 14, 0), picture.getvalue())
    handler = box(b"hdlr", bytes(8), b"mdirappl", bytes(9))
    cover = box(b"udta", box(b"meta", bytes(4), handler, box(b"ilst", box(b"covr", data))))
    content = bytearray(path.read_bytes())
    where = content.index(b"moov") - 4
    (size,) = struct.unpack_from(">I", content, where)
    struct.pack_into(">I", content, where, size + len(cover))
    content[where + 8 : where + 8] = cover
    path.write_bytes(content)
    return path


def encode_two(path: Path) -> Path:
    """Five dark frames of 16x16, and in the other stream five frames of `noise`, 48x64."""
    with av.open(str(path), "w") as container:
        both = []
        for frames in (torch.zeros(5, 16, 16, 3, dtype=torch.uint8), noise(5, 48, 64)):
            stream = container.add_stream("libx264", rate=10)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = "yuv420p"
            both.append((stream, frames))
        for stream, frames in both:
            for picture in frames:
                frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
    return path


def test_a_cover_is_not_the_video(tmp_path: Path) -> None:
    path = encode(tmp_path / "clip.mp4", counter(5), "libx264", "yuv420p")
    plain = read_video(path)
    add_cover(path)
    with av.open(str(path)) as container:
        assert [stream.width for stream in container.streams.video] == [40, 16]
    result = read_video(path)
    assert numbers(result) == list(range(5))
    assert torch.equal(result.frames, plain.frames)
    assert (result.fps, result.notes) == (24, ())


def test_a_file_with_a_cover_alone(tmp_path: Path) -> None:
    path = tmp_path / "song.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        sound = av.AudioFrame.from_ndarray(
            np.zeros((1, 1024), np.float32), format="fltp", layout="mono"
        )
        sound.sample_rate = 8000
        container.mux(stream.encode(sound))
        container.mux(stream.encode())
    with pytest.raises(VideoError, match=r"song.mp4: has a cover picture, and no video stream"):
        read_video(add_cover(path))


def test_of_several_videos_ffmpegs_choice_is_read_and_said(tmp_path: Path) -> None:
    path = encode_two(tmp_path / "clip.mp4")
    result = read_video(path)
    assert result.frames.shape == (5, 16, 16, 3)  # the first is marked as the default
    assert result.notes == (
        "of 2 video streams number 0 was read, which FFmpeg prefers, and not 1",
    )
    content = bytearray(path.read_bytes())
    content[content.index(b"tkhd") + 7] &= ~1  # the flag that the track is enabled
    path.write_bytes(content)
    result = read_video(path)
    assert result.frames.shape == (5, 48, 64, 3)
    assert result.notes == (
        "of 2 video streams number 1 was read, which FFmpeg prefers, and not 0",
    )
    opened = open_video(path)
    assert opened.notes == result.notes
    assert torch.equal(torch.cat(list(opened.parts(2))), result.frames)


DEFAULT = (
    "the file states no frame rate, and its frames were taken as 25 a second, FFmpeg's default"
)


@pytest.mark.parametrize(
    ("name", "codec", "pix_fmt", "count"),
    [
        ("a.png", "png", "rgb24", 1),
        ("a.jpg", "mjpeg", "yuvj420p", 1),
        ("a.bmp", "bmp", "bgr24", 1),
        ("a.mjpeg", "mjpeg", "yuvj420p", 3),
    ],
)
def test_a_rate_that_no_file_states(
    tmp_path: Path, name: str, codec: str, pix_fmt: str, count: int
) -> None:
    result = read_video(encode(tmp_path / name, smooth(count), codec, pix_fmt))
    assert (result.num_frames, result.fps, result.notes) == (count, 25, (DEFAULT,))


def test_the_rate_of_a_bare_stream_is_the_codecs_own(tmp_path: Path) -> None:
    for name, codec in (("a.h264", "libx264"), ("a.m2v", "mpeg2video")):
        path = encode(tmp_path / name, smooth(6), codec, "yuv420p", Fraction(24000, 1001))
        result = read_video(path)
        assert (result.fps, result.notes) == (Fraction(24000, 1001), ())
