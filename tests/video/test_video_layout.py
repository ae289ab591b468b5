"""How a stored frame becomes a picture: its size, its orientation, the shape of its pixels."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clips import encode, noise, smooth

from stem.video import VideoError, crop_to_multiple, read_video, write_video


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
