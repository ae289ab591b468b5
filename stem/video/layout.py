"""How a stored frame becomes a picture: turned upright, scaled, cropped."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from .frames import VideoError, size_text, usable_size
from .tone_mapping import tone_mapped

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
# AVCOL_SPC_*, the values of frame.colorspace that swscale converts by tables of their own: BT.709,
# FCC, BT.601 twice, SMPTE 240M, BT.2020 with constant luminance not among them.
_BT709, _BT601 = 1, 5
_CONVERTED = (_BT709, 4, _BT601, 6, 7, 9)
_UNTAGGED = (0, 2, 3)  # RGB's, which says nothing of other pixels, unspecified, reserved
_HD_LINES = 720


@dataclass(frozen=True)
class Layout:
    """How a stored frame becomes a picture; chosen at the first one and kept for all of them.

    Args:
        stored: Width and height that the frame is stored in.
        swapped: Whether rows and columns are exchanged.
        steps: Steps in x and y, 1 or -1, with which they are then read.
        scaled: Width and height of the upright picture before the crop.
        crop: Left, top, width and height of the crop.
        untagged: Matrix, as `frame.colorspace` has it, of frames that name none.
        hdr: Transfer of HDR pictures that are tone-mapped, as `tone_mapped` takes it; None: none.
    """

    stored: tuple[int, int]
    swapped: bool
    steps: tuple[int, int]
    scaled: tuple[int, int]
    crop: tuple[int, int, int, int]
    untagged: int
    hdr: int | None = None

    def apply(self, frame: av.VideoFrame) -> np.ndarray:
        """The picture of a frame, uint8 [H, W, 3].

        Raises:
            VideoError: its colours are stored by a matrix that swscale does not know.
        """
        if (frame.width, frame.height) != self.stored:
            return self._refitted((frame.width, frame.height)).apply(frame)
        source, target = _matrices(frame, self.untagged)
        width, height = reversed(self.scaled) if self.swapped else self.scaled
        form = "rgb24" if self.hdr is None else "rgb48le"
        rgb = frame.reformat(width, height, form, source, target, interpolation=SCALER)
        picture = rgb.to_ndarray()
        if self.swapped:
            picture = picture.swapaxes(0, 1)
        step_x, step_y = self.steps
        left, top, width, height = self.crop
        picture = picture[::step_y, ::step_x][top : top + height, left : left + width]
        return picture if self.hdr is None else tone_mapped(picture, self.hdr)

    def _refitted(self, stored: tuple[int, int]) -> Layout:
        """The layout that has frames of another size cover the same picture."""
        shown = stored[::-1] if self.swapped else stored
        factor = max(Fraction(self.scaled[side], shown[side]) for side in (0, 1))
        scaled = (round(shown[0] * factor), round(shown[1] * factor))
        left, top, width, height = self.crop
        left, top = (
            left + (scaled[0] - self.scaled[0]) // 2,
            top + (scaled[1] - self.scaled[1]) // 2,
        )
        return replace(self, stored=stored, scaled=scaled, crop=(left, top, width, height))


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
    stored = (frame.width, frame.height)
    shown = stored[::-1] if swapped else stored
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
    untagged = _BT709 if frame.height >= _HD_LINES else _BT601
    return Layout(stored, swapped, (step_x, step_y), scaled, (left, top, width, height), untagged)


def _matrices(frame: av.VideoFrame, untagged: int) -> tuple[int | None, str | None]:
    """The source's and the target's matrix as `reformat` takes them; None for RGB, which has none.

    PyAV before 17 converts by BT.601's, whatever the frame says, unless both ends are named.
    """
    if frame.format.is_rgb or frame.format.has_palette:
        return None, None
    matrix = untagged if frame.colorspace in _UNTAGGED else int(frame.colorspace)
    if matrix not in _CONVERTED:
        raise VideoError(
            f"the colours are stored by matrix {matrix} of ITU-T H.273, which cannot be read; "
            "first run ffmpeg -i FILE -vf zscale=m=bt709,format=yuv420p bt709.mp4"
        )
    return matrix, "DEFAULT"


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
