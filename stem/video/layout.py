"""How a stored frame becomes a picture: turned upright, scaled, cropped."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from .frames import VideoError, size_text, usable_size

MAX_SIDE = 8192
"""Pixels of a picture's longest side."""
_TOO_LARGE = (
    f"{MAX_SIDE} pixels a side are the most (8K video is 7680 wide, and every frame is held in "
    "memory)"
)
# SWS_BICUBIC | SWS_FULL_CHR_H_INT | SWS_ACCURATE_RND. Without the last two swscale repeats the
# chroma samples of 4:2:0 video, which costs some 14 dB on smooth pictures.
SCALER = 0x4 | 0x2000 | 0x40000
_SIZE_FORMS = 'an integer or "256" (the shorter side), or (width, height) or "512x320"'
_BT709 = 1  # AVCOL_SPC_BT709, the value of frame.colorspace


@dataclass(frozen=True)
class Layout:
    """How a stored frame becomes a picture; chosen at the first one and kept for all of them.

    Args:
        swapped: Whether rows and columns are exchanged.
        steps: Steps in x and y, 1 or -1, with which they are then read.
        scaled: Width and height of the upright picture before the crop.
        crop: Left, top, width and height of the crop.
    """

    swapped: bool
    steps: tuple[int, int]
    scaled: tuple[int, int]
    crop: tuple[int, int, int, int]

    def apply(self, frame: av.VideoFrame) -> np.ndarray:
        """The picture of a frame, uint8 [H, W, 3]."""
        # PyAV before 17 converts BT.709 as if it were BT.601 unless both ends are named.
        source, target = ("ITU709", "DEFAULT") if frame.colorspace == _BT709 else (None, None)
        width, height = reversed(self.scaled) if self.swapped else self.scaled
        rgb = frame.reformat(width, height, "rgb24", source, target, interpolation=SCALER)
        picture = rgb.to_ndarray()
        if self.swapped:
            picture = picture.swapaxes(0, 1)
        step_x, step_y = self.steps
        left, top, width, height = self.crop
        return picture[::step_y, ::step_x][top : top + height, left : left + width]


def plan(
    path: Path,
    frame: av.VideoFrame,
    pixel_aspect: Fraction | None,
    size: int | tuple[int, int] | None,
    multiple_of: int,
    notes: list[str],
) -> Layout:
    """Choose the layout for frames like this one, and add to notes what it changes."""
    swapped, step_x, step_y = _orientation(frame)
    shown = (frame.height, frame.width) if swapped else (frame.width, frame.height)
    if swapped or step_x < 0 or step_y < 0:
        notes.append("the pictures were turned upright, as the file's display matrix says")
    if pixel_aspect and pixel_aspect != 1:
        ratio = f"{pixel_aspect.numerator}:{pixel_aspect.denominator}"
        notes.append(f"the pixels are not square ({ratio}) and were read as if they were")

    factor = Fraction(1)
    if isinstance(size, int):
        factor = Fraction(size, min(shown))
    elif size is not None:
        factor = max(Fraction(size[0], shown[0]), Fraction(size[1], shown[1]))
    scaled = (round(shown[0] * factor), round(shown[1] * factor))
    if max(scaled) > MAX_SIDE:
        raise VideoError(
            f"{path}: its {size_text(shown)} would become {size_text(scaled)}; {_TOO_LARGE}, ask "
            "for a smaller size"
        )
    filled = size if isinstance(size, tuple) else scaled
    try:
        (width, height), cropped = usable_size(filled, multiple_of)
    except VideoError as error:
        raise VideoError(f"{path}: {error}") from error
    if scaled != shown:
        notes.append(
            f"{size_text(shown)} was resized to {size_text(scaled)}, to give the size asked for"
        )
    if filled != scaled:
        notes.append(
            f"{size_text(scaled)} was centre-cropped to {size_text(filled)}, the size asked for"
        )
    if cropped:
        notes.append(cropped)
    left, top = (scaled[0] - width) // 2, (scaled[1] - height) // 2
    return Layout(swapped, (step_x, step_y), scaled, (left, top, width, height))


def _orientation(frame: av.VideoFrame) -> tuple[bool, int, int]:
    """Read (swapped, step in x, step in y) from the display matrix, to the nearest quarter turn."""
    side_data: Any = frame.side_data  # its type differs between the releases of PyAV
    if "DISPLAYMATRIX" not in side_data:
        return False, 1, 1
    data = bytes(side_data["DISPLAYMATRIX"])
    # The stored point (x, y) is shown at (a x + c y, b x + d y), up to a shift.
    a, b, _, c, d = np.frombuffer(data, dtype=np.int32)[:5].tolist()
    swapped = abs(b) + abs(c) > abs(a) + abs(d)
    along_x, along_y = (c, b) if swapped else (a, d)
    return swapped, -1 if along_x < 0 else 1, -1 if along_y < 0 else 1


def parse_size(size: int | tuple[int, int] | str | None) -> int | tuple[int, int] | None:
    """The shorter side, width and height, or None; a VideoError for what is neither."""
    if size is None:
        return None
    numbers: tuple[int, ...] = ()
    if isinstance(size, str):
        match = re.fullmatch(r"(\d+)(?:x(\d+))?", size.strip(), re.ASCII)
        numbers = tuple(int(part) for part in match.groups() if part) if match else ()
    elif isinstance(size, int):
        numbers = (size,)
    elif len(size) == 2 and all(isinstance(side, int) for side in size):
        numbers = tuple(size)
    if not numbers or min(numbers) < 1:
        raise VideoError(f"size {size!r} is not usable; give {_SIZE_FORMS}, all at least 1")
    if max(numbers) > MAX_SIDE:
        raise VideoError(f"size {size!r} is not usable; {_TOO_LARGE}")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])
