"""Pictures of several videos together, for a person to look at."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont

SHEET_FRAMES = 6
MIN_SIDE = 128  # smaller frames are magnified, pixel by pixel
_LABEL_HEIGHT = 24


def contact_sheet(
    videos: Mapping[str, torch.Tensor], columns: int = SHEET_FRAMES, *, numbered: bool = True
) -> Image.Image:
    """A picture with one labelled line per video and up to `columns` frames, evenly spread.

    Args:
        videos: Videos by label, uint8 [N, H, W, 3], all of one shape.
        columns: at most so many frames of each.
        numbered: write each frame's number above the first line.
    """
    shown = shown_frames(next(iter(videos.values())).shape[0], columns)
    lines = {label: video[shown] for label, video in videos.items()}
    return labelled_lines(lines, shown if numbered else None)


def shown_frames(count: int, columns: int = SHEET_FRAMES) -> list[int]:
    """Numbers of up to `columns` frames of a video, evenly spread from the first to the last.

    Args:
        count: Number of the video's frames.
        columns: Number of frames to show, at most.
    """
    columns = min(columns, count)
    return [round(index * (count - 1) / max(1, columns - 1)) for index in range(columns)]


def labelled_lines(lines: Mapping[str, torch.Tensor], numbers: Sequence[int] | None) -> Image.Image:
    """A picture with one labelled line of frames for each entry.

    Args:
        lines: Frames by label, uint8 [k, H, W, 3], all of one shape.
        numbers: Numbers of the k frames, to write above the first line; None: none are written.
    """
    first = next(iter(lines.values()))
    width, height = _shown_size(first)
    line_height = height + _LABEL_HEIGHT
    sheet = Image.new("RGB", (first.shape[0] * width, len(lines) * line_height), "white")
    draw = ImageDraw.Draw(sheet)
    font = ImageFont.load_default(14)
    for line, (label, frames) in enumerate(lines.items()):
        draw.text((4, line * line_height + 4), label, "black", font)
        for column, frame in enumerate(frames):
            if line == 0 and numbers is not None:
                number = (column * width + width - 4, 4)
                draw.text(number, f"frame {numbers[column]}", "black", font, anchor="ra")
            picture = _picture(frame, (width, height))
            sheet.paste(picture, (column * width, line * line_height + _LABEL_HEIGHT))
    return sheet


@dataclass(frozen=True)
class Grid:
    """Where several videos of one shape lie in the video that shows all of them at once.

    Args:
        count: Number of the videos.
        width: Width of their frames in pixels, before they are magnified.
        height: Height of their frames, likewise.
    """

    count: int
    width: int
    height: int

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the whole in pixels."""
        width, height = self._shown
        lines = math.ceil(self.count / self._columns)
        return self._columns * width, lines * (height + _LABEL_HEIGHT)

    def corner(self, index: int) -> tuple[int, int]:
        """Left and top of a video's label in pixels; its pictures lie below."""
        width, height = self._shown
        column, line = index % self._columns, index // self._columns
        return column * width, line * (height + _LABEL_HEIGHT)

    def cut(self, whole: Image.Image) -> list[Image.Image]:
        """The videos' own frames out of one frame of the whole, at the size before."""
        width, height = self._shown
        found = []
        for index in range(self.count):
            left, top = self.corner(index)
            top += _LABEL_HEIGHT
            box = (left, top, left + width, top + height)
            found.append(whole.reduce(_scale(self.width, self.height), box))
        return found

    @property
    def _shown(self) -> tuple[int, int]:
        scale = _scale(self.width, self.height)
        return scale * self.width, scale * self.height

    @property
    def _columns(self) -> int:
        return math.ceil(math.sqrt(self.count)) if self.width < 2 * self.height else 1


def side_by_side(videos: Mapping[str, Iterable[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """The frames of all videos at once, labelled: uint8 [H, W, 3], frame after frame.

    Args:
        videos: Frames of each video by label, uint8 [H, W, 3], all of one shape; a tensor of
            frames [N, H, W, 3] is one, too.
    """
    font = ImageFont.load_default(14)
    for frames in zip(*videos.values(), strict=True):
        height, width = frames[0].shape[:2]
        grid = Grid(len(videos), width, height)
        canvas = Image.new("RGB", grid.size, "white")
        draw = ImageDraw.Draw(canvas)
        for index, (label, frame) in enumerate(zip(videos, frames, strict=True)):
            left, top = grid.corner(index)
            draw.text((left + 4, top + 4), label, "black", font)
            canvas.paste(_picture(frame, grid._shown), (left, top + _LABEL_HEIGHT))
        pixels = torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8)
        yield pixels.view(canvas.height, canvas.width, 3)


def _scale(width: int, height: int) -> int:
    return math.ceil(MIN_SIDE / min(height, width))


def _shown_size(frames: torch.Tensor) -> tuple[int, int]:
    """Width and height at which frames [N, H, W, 3] are shown."""
    height, width = frames.shape[1:3]
    scale = _scale(width, height)
    return scale * width, scale * height


def _picture(frame: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(frame.numpy()).resize(size, Image.Resampling.NEAREST)
