"""Files that cannot be read as videos, or not whole, and what is said of them."""

from __future__ import annotations

import wave
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from av.stream import Disposition
from clips import encode, noise, smooth

from stem.video import FrameRange, VideoError, read_video, reading, write_video


def encode_early_header(path: Path, frames: torch.Tensor) -> Path:
    """H.264 whose index comes first, so that the file opens even when its end is lost."""
    return encode(path, frames, "libx264", "yuv420p", muxer={"movflags": "faststart"})


def packet_ends(path: Path) -> list[int]:
    with av.open(str(path)) as container:
        return [packet.pos + packet.size for packet in container.demux(video=0) if packet.size]


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
    stream = SimpleNamespace(
        index=0,
        disposition=Disposition(0),
        codec_context=object(),
        average_rate=None,
        guessed_rate=None,
    )
    container: Any = SimpleNamespace(
        format=SimpleNamespace(name="mov", flags=0),
        streams=SimpleNamespace(video=[stream], best=lambda kind: stream),
    )
    path = tmp_path / "clip.mp4"
    path.touch()
    reader = reading._Reader(path, FrameRange(), None, 8, False, False)
    with pytest.raises(VideoError, match=r"clip.mp4: states no frame rate"):
        next(reader._read(container))
