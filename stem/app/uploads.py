"""Videos that come from outside: looked at before a decoder does, and kept under names of our own.

FFmpeg reads lists of other files, pictures and texts, too, whatever a file is called. So the first
bytes say which of a few containers a file may be, FFmpeg is told to read it as that one alone, and
the limits are checked before a frame is decoded.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import io
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage import replacing, write_atomically

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.stream import VideoStream

_READ = 2**20
_LABEL = 60  # letters of a file's name that are shown
_PICTURES = (b"avif", b"avis", b"heic", b"heix", b"mif1", b"msf1", b"hevc", b"crx ")  # ftyp brands
THUMBNAILS, THUMBNAIL_HEIGHT = 12, 72


class UploadError(ValueError):
    """A file that is not taken, with the reason and what to do in one line."""


@dataclass(frozen=True)
class Limits:
    """What is taken.

    Args:
        megabytes: Size of a file at most, in 2^20 bytes.
        frames: Number of frames at most.
        pixels: Pixels of a frame at most.
    """

    megabytes: int = 512
    frames: int = 20_000
    pixels: int = 4096 * 2304


LIMITS = Limits()


@dataclass(frozen=True)
class Kept:
    """A video that was taken.

    Args:
        path: Path of it.
        label: Name that is shown, the file's own where it came from outside.
        width: Width of its frames in pixels.
        height: Height of its frames in pixels.
        frames: Number of its frames.
        fps: Frames per second, as a fraction's text.
        prompt: Description of it, where one is known.
    """

    path: Path
    label: str
    width: int
    height: int
    frames: int
    fps: str
    prompt: str = ""


def container_of(head: bytes) -> tuple[str, str] | None:
    """FFmpeg's name of the container that a file's first bytes are of, and the end of a name.

    Args:
        head: First 400 bytes of the file, or all of it.
    """
    if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
        return None if head[8:12] in _PICTURES and head[4:8] == b"ftyp" else ("mov", ".mp4")
    if head[:4] == b"\x1a\x45\xdf\xa3":
        return "matroska", ".mkv"
    if head[:4] == b"RIFF" and head[8:12] == b"AVI ":
        return "avi", ".avi"
    if head[:3] == b"FLV":
        return "flv", ".flv"
    if head[:4] == b"OggS":
        return "ogg", ".ogv"
    if head[:4] == b"\x00\x00\x01\xba":
        return "mpeg", ".mpg"
    if head[:4] == b"\x30\x26\xb2\x75":
        return "asf", ".wmv"
    if head[:10] == b"YUV4MPEG2 ":
        return "yuv4mpegpipe", ".y4m"
    if len(head) > 376 and head[0] == head[188] == head[376] == 0x47:
        return "mpegts", ".ts"
    return None


def examine(path: Path, label: str, limits: Limits = LIMITS) -> tuple[Kept, str]:
    """What a file from outside holds, and the end of a name that fits; one frame is decoded.

    Args:
        path: File.
        label: Name that errors and the page call it.
        limits: What is taken.

    Raises:
        UploadError: it is no video, or beyond a limit.
    """
    size = path.stat().st_size
    if size == 0:
        raise UploadError(f"{label} is empty; upload it again, or another video")
    if size > limits.megabytes * 2**20:
        raise UploadError(
            f"{label} has {size / 2**20:,.0f} MiB, and {limits.megabytes} are taken; cut it or "
            "compress it first"
        )
    with path.open("rb") as file:
        found = container_of(file.read(400))
    if found is None:
        raise UploadError(
            f"{label} is no video by what is in it, whatever its name says; upload MP4, MOV, MKV, "
            "WebM, AVI, MPEG, FLV, Ogg, WMV or Y4M"
        )
    name, suffix = found
    import av

    # A picture may be larger than its file says, and FFmpeg decodes a few to look at them.
    most = {"max_pixels": str(limits.pixels)}
    try:
        with av.open(str(path.absolute()), format=name, options=most) as container:
            kept = _measured(container, path, label, limits)
    except av.FFmpegError as error:
        raise UploadError(
            f"{label} cannot be read as a video ({error.strerror}); check that it plays, and that "
            f"its frames have at most {limits.pixels:,} pixels"
        ) from error
    return kept, suffix


def _measured(container: InputContainer, path: Path, label: str, limits: Limits) -> Kept:
    stream = _stream(container, label, limits)
    _check_pixels(stream.width, stream.height, label, limits)
    frames = 0
    for packet in container.demux(stream):  # a header may say anything of their number
        frames += packet.size > 0
        if frames > limits.frames:
            raise UploadError(
                f"{label} has more than {limits.frames:,} frames, the most that are taken; cut it "
                "first"
            )
    container.seek(0)
    first = next(container.decode(stream), None)
    if first is None:
        raise UploadError(f"{label} has no frame that can be decoded; check that it plays")
    _check_pixels(first.width, first.height, label, limits)
    rate = stream.average_rate or stream.guessed_rate or Fraction(0)
    return Kept(path, label, first.width, first.height, frames, str(Fraction(rate)))


def _stream(container: InputContainer, label: str, limits: Limits) -> VideoStream:
    if not container.streams.video:
        raise UploadError(f"{label} has no pictures in it; upload a video")
    best = container.streams.best("video")
    stream = next((each for each in container.streams.video if each is best), None)
    stream = stream or container.streams.video[0]
    if stream.codec_context is None:
        raise UploadError(f"{label} is of a codec that FFmpeg here lacks; convert it to H.264")
    # A frame may be larger than the container says, and a decoder makes room for it at once.
    stream.codec_context.options = {"max_pixels": str(limits.pixels)}
    return stream


def _check_pixels(width: int, height: int, label: str, limits: Limits) -> None:
    if not width or not height:  # FFmpeg refused to look
        raise UploadError(
            f"{label} has frames of more than {limits.pixels:,} pixels, the most that are taken, "
            "or damaged ones; scale it down first"
        )
    if width * height > limits.pixels:
        raise UploadError(
            f"{label} has frames of {width:,}x{height:,} pixels, and {limits.pixels:,} pixels are "
            "taken at most; scale it down first"
        )


def shown_label(name: str) -> str:
    """A file's name as it is shown: its last part, printable and short; never a path."""
    last = name.replace("\\", "/").rsplit("/", 1)[-1]
    text = "".join(letter for letter in last if letter.isprintable()).strip(" .") or "video"
    return text if len(text) <= _LABEL else f"{text[: _LABEL - 1]}…"


class Videos:
    """The videos that may be taken: those uploaded, and those that come with the package.

    Args:
        folder: Folder of those uploaded.
        limits: What is taken.
    """

    def __init__(self, folder: Path, limits: Limits = LIMITS) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._limits = folder, limits

    def keep(self, path: Path, name: str) -> str:
        """Copy an upload into the folder; the key that it has from now on.

        Args:
            path: File.
            name: Name that it has outside.

        Raises:
            UploadError: it is no video, or beyond a limit; nothing was written.
        """
        kept, suffix = examine(path, shown_label(name), self._limits)
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(_READ):
                digest.update(part)
        key = digest.hexdigest()[:12]
        target = self._folder / f"{key}{suffix}"
        if not target.exists():
            with replacing(target) as partial:
                shutil.copyfile(path, partial)
        self._write(key, kept, target)
        return key

    def add(self, key: str, path: Path, label: str, prompt: str) -> None:
        """Take a video of our own.

        Args:
            key: Key that it has from now on.
            path: File.
            label: Name that is shown.
            prompt: Description of it, or "".
        """
        kept, _ = examine(path, label, self._limits)
        self._write(key, dataclasses.replace(kept, prompt=prompt), path)

    def all(self) -> dict[str, Kept]:
        """The videos by key."""
        found = {}
        for file in sorted(self._folder.glob("*.json"), key=lambda file: file.stat().st_mtime):
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
                document = json.loads(file.read_bytes())
                kept = Kept(**{**document, "path": Path(document["path"])})
                if kept.path.is_file():
                    found[file.stem] = kept
        return found

    def _write(self, key: str, kept: Kept, path: Path) -> None:
        document = {**dataclasses.asdict(kept), "path": str(path.absolute())}
        write_atomically(self._folder / f"{key}.json", json.dumps(document).encode())


def thumbnails(kept: Kept, count: int = THUMBNAILS) -> list[tuple[int, str]]:
    """Some frames of a video, evenly apart: their numbers, and pictures as data URIs.

    Args:
        kept: Video.
        count: Number of frames at most.
    """
    import av

    wanted = sorted({round(i * (kept.frames - 1) / max(1, count - 1)) for i in range(count)})
    found = []
    with kept.path.open("rb") as file:
        name = container_of(file.read(400))
    with (
        contextlib.suppress(av.FFmpegError),
        av.open(str(kept.path), format=name[0] if name else None) as container,
    ):
        stream = _stream(container, kept.label, LIMITS)
        stream.thread_type = "AUTO"
        for number, picture in _frames(container, stream, wanted):
            found.append((number, picture))
    return found


def _frames(
    container: InputContainer, stream: VideoStream, wanted: list[int]
) -> Iterator[tuple[int, str]]:
    for number, frame in enumerate(container.decode(stream)):
        if number not in wanted:
            continue
        width = max(1, round(frame.width * THUMBNAIL_HEIGHT / frame.height))
        data = io.BytesIO()
        frame.to_image(width=width, height=THUMBNAIL_HEIGHT).save(data, "jpeg", quality=80)
        yield number, f"data:image/jpeg;base64,{base64.b64encode(data.getvalue()).decode()}"
        if number == wanted[-1]:
            return
