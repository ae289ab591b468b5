"""What comes from outside: looked at before it is decoded, kept under names of our own."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from clips import encode, smooth
from PIL import Image

from stem.app.uploads import Limits, UploadError, Videos, shown_label, thumbnails

SMALL = Limits(megabytes=1, frames=8, pixels=10_000)


def files(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encode(tmp_path_factory.mktemp("clip") / "a.mp4", smooth(6), "libx264", "yuv420p")


def picture(path: Path) -> None:
    data = io.BytesIO()
    Image.new("RGB", (64, 64)).save(data, "png")
    path.write_bytes(data.getvalue())


def large(path: Path) -> None:
    path.write_bytes(b"YUV4MPEG2 W10000 H10000 F25:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(1000))


def playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n")


def large_within(path: Path) -> None:
    """Pictures that are larger than their file says."""
    film = encode(path.with_name("film.avi"), smooth(2), "mjpeg", "yuvj420p")
    start = b"\xff\xc0\x00\x11\x08"  # of a JPEG's frame, before its height and width
    real, other = (
        start + b"".join(number.to_bytes(2) for number in size) for size in ((48, 64), (9000, 9000))
    )
    assert film.read_bytes().count(real) == 2
    path.write_bytes(film.read_bytes().replace(real, other))
    film.unlink()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (picture, "is no video by what is in it"),
        (lambda path: path.write_text("no video at all"), "is no video by what is in it"),
        (lambda path: path.write_bytes(b""), "is empty"),
        (playlist, "is no video by what is in it"),
        (lambda path: path.write_bytes(b"\0\0\0\x18ftypisom" + bytes(400)), "cannot be read"),
        (large, "has frames of 10,000x10,000 pixels"),
        (large_within, "its frames have at most 10,000 pixels"),
        (lambda path: encode(path, smooth(9)), "has more than 8 frames"),
        (lambda path: path.write_bytes(bytes(2**20 + 1)), "MiB, and 1 are taken"),
    ],
)
def test_what_is_no_video_or_too_large_is_refused_in_one_line(
    tmp_path: Path, make: Callable[[Path], object], said: str
) -> None:
    given = tmp_path / "outside" / "holiday.mp4"
    given.parent.mkdir()
    make(given)
    videos = Videos(tmp_path / "in", SMALL)
    before = files(tmp_path)
    with pytest.raises(UploadError) as caught:
        videos.keep(given, "../../../holiday.mp4")
    assert said in str(caught.value)
    assert str(caught.value).startswith("holiday.mp4 ")
    assert "\n" not in str(caught.value)
    assert files(tmp_path) == before
    assert videos.all() == {}


@pytest.mark.parametrize("name", ["../../x/../a b.mp4", "..\\a b.mp4", "/etc/a b.mp4"])
def test_a_name_never_becomes_a_path(tmp_path: Path, clip: Path, name: str) -> None:
    folder = tmp_path / "in"
    key = Videos(folder, SMALL).keep(clip, name)
    kept = Videos(folder, SMALL).all()[key]
    assert kept.label == "a b.mp4"
    assert (kept.width, kept.height, kept.frames, kept.fps) == (64, 48, 6, "24")
    assert set(files(tmp_path)) == {f"in/{key}.mp4", f"in/{key}.json"}
    assert kept.path.read_bytes() == clip.read_bytes()
    assert [number for number, _ in thumbnails(kept, 3)] == [0, 2, 5]


def test_labels_are_short_and_printable() -> None:
    assert shown_label("a\0b\x1b[31m.mp4") == "ab[31m.mp4"
    assert shown_label("..") == "video"
    assert len(shown_label("x" * 300)) == 60


def test_a_damaged_record_is_left_out(tmp_path: Path, clip: Path) -> None:
    videos = Videos(tmp_path / "in", SMALL)
    key = videos.keep(clip, "a.mp4")
    (tmp_path / "in" / "other.json").write_text(json.dumps({"path": "/etc/passwd"}))
    assert list(videos.all()) == [key]
