"""What is said of frames that are not plain pictures, and what is made of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from clips import encode, encode_fields, noise, psnr, smooth

from stem.video import open_video, read_video


def bare(path: Path, frames: torch.Tensor) -> bytes:
    """H.264 without a container; such files may be joined by their bytes."""
    return encode(path, frames, "libx264", "yuv420p", options={"crf": "4"}).read_bytes()


def test_a_size_that_changes_within_the_file(tmp_path: Path) -> None:
    wide = smooth(3)
    tall = smooth(4, 128, 96, detail=0.5)
    first, second = (
        bare(tmp_path / f"{name}.h264", frames) for name, frames in (("wide", wide), ("tall", tall))
    )
    path = tmp_path / "both.h264"
    path.write_bytes(first + second)
    result = read_video(path)
    assert result.frames.shape == (7, 48, 64, 3)
    assert psnr(result.frames[:3], wide) > 35
    # as wide as the first ones, and of the height the middle
    alone = read_video(tmp_path / "tall.h264", size=(64, 48)).frames
    assert torch.equal(result.frames[3:], alone)
    assert result.notes == (
        "the size changes within the file: the frames of another than 64x48, 4 from frame 3 "
        "(96x128) on, were scaled and centre-cropped to it",
    )
    assert read_video(path, frames="3").notes == ()
    cropped = read_video(path, size=(32, 48))
    assert torch.equal(
        cropped.frames[3:], read_video(tmp_path / "tall.h264", size=(64, 48)).frames[:, :, 16:48]
    )
    assert torch.equal(torch.cat(list(open_video(path).parts(2))), result.frames)


def test_interlaced_frames_are_said_and_mended_where_asked(tmp_path: Path) -> None:
    moments = smooth(12, 64, 64)
    path = encode_fields(tmp_path / "clip.mp4", moments)
    (note,) = read_video(path).notes
    assert note.startswith("6 frames are interlaced and were read as they are, with combs")
    assert "deinterlace=True (--deinterlace)" in note
    assert psnr(read_video(path).frames, moments[0::2]) < 25
    result = read_video(path, deinterlace=True)
    assert (result.num_frames, result.fps) == (6, 25)
    assert psnr(result.frames, moments[0::2]) > 40
    assert result.notes == (
        "the frames were deinterlaced (bwdif): of each the first field, its gaps filled in",
    )
    some = read_video(path, frames="1:6:2", deinterlace=True)
    assert torch.equal(some.frames, result.frames[1::2])
    opened = open_video(path, deinterlace=True)
    assert (opened.num_frames, opened.notes) == (6, result.notes)
    assert torch.equal(torch.cat(list(opened.parts(4))), result.frames)
    alone = read_video(path, frames="1", deinterlace=True)
    assert alone.frames.shape == (1, 64, 64, 3)


def test_frames_of_several_sizes_are_deinterlaced(tmp_path: Path) -> None:
    path = tmp_path / "both.h264"
    path.write_bytes(
        b"".join(
            bare(tmp_path / f"{height}.h264", smooth(3, height, 64)) for height in (48, 32, 96)
        )
    )
    result = read_video(path, deinterlace=True)
    assert result.num_frames == 9
    assert psnr(result.frames[:3], smooth(3)) > 30


@pytest.mark.parametrize(("transfer", "name"), [(16, "PQ"), (18, "HLG")])
def test_hdr_is_said(tmp_path: Path, transfer: int, name: str) -> None:
    tags = {"color_trc": transfer, "color_primaries": 9, "colorspace": 9}
    path = encode(tmp_path / "clip.mp4", smooth(2), "libx264", "yuv420p10le", **tags)
    (note,) = read_video(path).notes
    assert note.startswith(f"the pictures are HDR ({name}) and were read as if they were SDR")
    assert "pass tone_map=True (--tone-map)" in note


def test_wide_colours_are_said(tmp_path: Path) -> None:
    for primaries, name in ((9, "BT.2020"), (12, "Display P3"), (1, "")):
        tags = {"color_trc": 1, "color_primaries": primaries, "colorspace": 1}
        notes = read_video(
            encode(tmp_path / "clip.mp4", smooth(2), "libx264", "yuv420p", **tags)
        ).notes
        assert [note.split(" and ")[0] for note in notes] == (
            [f"the colours are of {name}"] if name else []
        )


def test_transparency_is_said(tmp_path: Path) -> None:
    opaque = torch.cat([noise(3, 16, 16), torch.full((3, 16, 16, 1), 255, dtype=torch.uint8)], 3)
    path = encode(tmp_path / "clip.mkv", opaque, pix_fmt="bgra")
    assert read_video(path).notes == ()
    clear = opaque.clone()
    clear[2, 3, 5, 3] = 100
    result = read_video(encode(path, clear, pix_fmt="bgra"))
    assert torch.equal(result.frames, opaque[..., :3])
    (note,) = result.notes
    assert note.startswith("the pictures are transparent in places, and were read as if they were")
    assert read_video(path, frames="2").notes == ()
    grey = encode(tmp_path / "grey.mov", clear, "png", "ya8")
    assert "transparent" in read_video(grey).notes[0]


def test_transparent_colours_of_a_palette_are_said(tmp_path: Path) -> None:
    from PIL import Image

    path = tmp_path / "clip.png"
    picture = Image.new("P", (16, 16), 1)
    picture.putpalette([0, 0, 0, 200, 100, 50])
    picture.save(path)
    assert not any("transparent" in note for note in read_video(path).notes)
    picture.putpixel((3, 3), 0)
    picture.save(path, transparency=0)
    assert any("transparent" in note for note in read_video(path).notes)
