"""Pictures of several videos together, for a person to look at."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

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


def side_by_side(videos: Mapping[str, torch.Tensor]) -> Iterator[torch.Tensor]:
    """The frames of all videos at once, labelled: uint8 [H, W, 3], frame after frame.

    Args:
        videos: Videos by label, uint8 [N, H, W, 3], all of one shape.
    """
    first = next(iter(videos.values()))
    width, height = _shown_size(first)
    columns = math.ceil(math.sqrt(len(videos))) if width < 2 * height else 1
    lines = math.ceil(len(videos) / columns)
    size = (columns * width, lines * (height + _LABEL_HEIGHT))
    for frame in range(first.shape[0]):
        canvas = Image.new("RGB", size, "white")
        draw = ImageDraw.Draw(canvas)
        for index, (label, video) in enumerate(videos.items()):
            left = (index % columns) * width
            top = (index // columns) * (height + _LABEL_HEIGHT)
            draw.text((left + 4, top + 4), label, "black", ImageFont.load_default(14))
            canvas.paste(_picture(video[frame], (width, height)), (left, top + _LABEL_HEIGHT))
        yield torch.frombuffer(bytearray(canvas.tobytes()), dtype=torch.uint8).view(
            size[1], size[0], 3
        )


def _shown_size(frames: torch.Tensor) -> tuple[int, int]:
    """Width and height at which frames [N, H, W, 3] are shown."""
    height, width = frames.shape[1:3]
    scale = math.ceil(MIN_SIDE / min(height, width))
    return scale * width, scale * height


def _picture(frame: torch.Tensor, size: tuple[int, int]) -> Image.Image:
    return Image.fromarray(frame.numpy()).resize(size, Image.Resampling.NEAREST)
