"""Writing videos: what the file holds, what is refused, and what a failure leaves."""

from __future__ import annotations

import ctypes
import os
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from clips import noise, psnr, smooth

from stem.video import check_video_output, open_video, read_video, write_video
from stem.video.writing import most_bytes


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


@pytest.mark.parametrize("name", ["take:1.mp4", "http:a.mp4"])
def test_a_colon_in_a_name_is_no_protocol(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    check_video_output(Path(name), 6, 48, 64)
    write_video(name, smooth(), 10)
    assert [file.name for file in tmp_path.iterdir()] == [name]
    result = read_video(name)
    assert (result.num_frames, result.notes, result.name) == (6, (), name.removesuffix(".mp4"))
    assert torch.equal(torch.cat(list(open_video(name).parts(4))), result.frames)


def test_a_file_that_cannot_be_written_takes_no_frame(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "file").touch()
    for name in ("folder.mp4", "file/clip.mp4", f"{'a' * 240}.mp4", "clip.gif"):
        parts = iter([smooth()])
        with pytest.raises((OSError, ValueError), match=Path(name).stem[:8]):
            write_video(tmp_path / name, parts, 10)
        assert next(parts, None) is not None, name


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
    for name in (f"{'a' * 240}.mp4", f"to come/{'a' * 240}.mp4"):  # 244 bytes, with the rest 255
        with pytest.raises(OSError, match=r"a.mp4 cannot be written: its name is too long"):
            check_video_output(tmp_path / name, 16, 64, 64)
    check_video_output(tmp_path / f"{'a' * 230}.mp4", 16, 64, 64)
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match=r"clip.mp4 needs 86,016 bytes, and 1,000 are free"):
        check_video_output(tmp_path / "clip.mp4", 16, 64, 64)
