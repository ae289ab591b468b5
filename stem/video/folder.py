"""Pictures of a folder, read as a video's frames."""

from __future__ import annotations

import os
import re
from fractions import Fraction
from pathlib import Path

import torch

from .frames import FrameRange, Video, VideoError, size_text
from .reading import read_video

_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
_RATE = Fraction(25)  # of a still, too


def read_pictures(
    folder: str | os.PathLike[str],
    *,
    frames: FrameRange | str | None = None,
    size: int | tuple[int, int] | str | None = None,
    multiple_of: int = 8,
) -> Video:
    """Read the pictures of a folder as the frames of a video of 25 frames a second.

    Their order is that of their names, where a number counts by its value: 2.png is before 10.png.

    Args:
        folder: Folder of pictures in PNG, JPEG, WebP, BMP or TIFF; other files in it are left.
        frames: Pictures to keep, a `FrameRange` or its text, counted from 0; None keeps all.
        size: Size in pixels, as for `read_video`.
        multiple_of: Number that width and height become multiples of, as for `read_video`.

    Raises:
        VideoError: there is no such folder or no picture in it, the range has none or ends after
            the last, a picture cannot be read, or their sizes differ.
    """
    path = Path(folder)
    found = picture_files(path)
    asked = FrameRange.parse(frames) if isinstance(frames, str) else frames or FrameRange()
    chosen = found[asked.start : asked.stop : asked.stride]
    if not chosen or (asked.stop is not None and asked.stop > len(found)):
        raise VideoError(
            f"{folder}: asked for pictures {str(asked).removesuffix(':1')}, the folder has "
            f"{len(found)}"
        )
    read: list[torch.Tensor] = []
    notes: dict[str, None] = {}
    for file in chosen:
        picture = read_video(file, size=size, multiple_of=multiple_of)
        if picture.num_frames != 1:
            raise VideoError(f"{file}: has {picture.num_frames} frames; name a still")
        if read and picture.frames.shape != read[0].shape:
            height, width = read[0].shape[1:3]
            raise VideoError(
                f"{file}: is {size_text((picture.width, picture.height))}, and the pictures before "
                f"it are {size_text((width, height))}; make them one size, or ask for a size"
            )
        read.append(picture.frames)
        notes.update(dict.fromkeys(picture.notes))
    return Video(torch.cat(read), _RATE, tuple(notes), path.name)


def picture_files(folder: Path) -> list[Path]:
    """The pictures of a folder in the order of `read_pictures`.

    Raises:
        VideoError: there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise VideoError(f"{folder}: no such folder; check the path")
    found = sorted(
        (file for file in folder.iterdir() if file.suffix.lower() in _PICTURES), key=_by_numbers
    )
    if not found:
        raise VideoError(f"{folder}: holds no picture ({', '.join(_PICTURES)})")
    return found


def _by_numbers(file: Path) -> list[tuple[bool, int, str]]:
    parts = re.split(r"(\d+)", file.name)
    return [(part.isdecimal(), int(part) if part.isdecimal() else 0, part) for part in parts]
