"""Which of a file's frames are read: ranges as text, and what they cannot be."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch
from clips import counter, encode, numbers
from hypothesis import given
from hypothesis import strategies as st

from stem.video import FrameRange, VideoError, read_video


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
