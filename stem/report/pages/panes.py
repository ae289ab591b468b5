"""The videos of a report, frame by frame: cut out of the one that shows them all at once.

A browser's video element gives no exact frame, and two of them no common clock; pictures do, in
every browser. They are lossless, so that a pixel of the page is one of the file.
"""

from __future__ import annotations

import base64
import io
import math
from pathlib import Path

from PIL import Image

from ...video import open_video
from ..pictures import Grid

MOST_PIXELS = 64 * 2**20
"""Pixels of all frames of a player; of a longer video every second, third, ... frame is shown."""
_PART = 8  # frames held at once


def every_nth(count: int, num_frames: int, width: int, height: int) -> int:
    """Every how many frames a player takes.

    Args:
        count: Number of its panes.
        num_frames: Number of frames of each.
        width: Width of the frames in pixels.
        height: Height of the frames in pixels.
    """
    return max(1, math.ceil(count * num_frames * width * height / MOST_PIXELS))


def read_panes(path: Path, count: int, width: int, height: int, every: int) -> list[list[str]]:
    """The frames of each video of a file that `side_by_side` made.

    Args:
        path: File to read.
        count: Number of videos in it.
        width: Width of one video's frames in pixels.
        height: Height of one video's frames in pixels.
        every: Every how many frames are taken.

    Returns:
        Data URIs of the frames, video by video.

    Raises:
        VideoError: it is no such file.
    """
    grid = Grid(count, width, height)
    panes: list[list[str]] = [[] for _ in range(count)]
    number = 0
    for part in open_video(path, multiple_of=1).parts(_PART):
        for whole in part:
            if number % every == 0:
                pictures = grid.cut(Image.fromarray(whole.numpy()))
                for frames, picture in zip(panes, pictures, strict=True):
                    frames.append(_data_uri(picture))
            number += 1
    return panes


def _data_uri(picture: Image.Image) -> str:
    data = io.BytesIO()
    # Of lossless pictures the quality is the effort: the least is twice as fast, and 1 % larger.
    picture.save(data, "webp", lossless=True, method=1, quality=0)
    return f"data:image/webp;base64,{base64.b64encode(data.getvalue()).decode()}"
