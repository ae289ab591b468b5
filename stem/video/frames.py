"""Frames in memory, and which of a file's frames to take."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

import torch

_RANGE_FORMS = '"16" (the first 16), "8:40", "8:40:2", ":16", "10:", "::4"'


class VideoError(ValueError):
    """A video file that cannot be used, or a request that it cannot fulfil."""


@dataclass(frozen=True)
class FrameRange:
    """The frames `start, start + stride, ...` before `stop`, as in a slice.

    Args:
        start: Number of the first frame, at least 0.
        stop: Number after that of the last frame, above `start`; None: to the end.
        stride: Number of frames from one to the next, at least 1.

    Raises:
        VideoError: one of them is out of its range.
    """

    start: int = 0
    stop: int | None = None
    stride: int = 1

    def __post_init__(self) -> None:
        if self.start < 0 or self.stride < 1:
            raise VideoError(f"frames {self}: start must be at least 0 and stride at least 1")
        if self.stop is not None and self.stop <= self.start:
            raise VideoError(f"frames {self}: no frame lies in it; stop must be above start")

    @classmethod
    def parse(cls, text: str) -> FrameRange:
        """Read "16" (the first 16 frames), "8:40", "8:40:2", ":16", "10:" or "::4"."""
        match = re.fullmatch(r"(\d*):(\d*)(?::(\d*))?|(\d+)", text.strip(), re.ASCII)
        if match is None:
            raise VideoError(f"frames {text!r} is not a range; write one of {_RANGE_FORMS}")
        start, stop, stride, count = (int(part) if part else None for part in match.groups())
        try:
            if count is not None:
                return cls(stop=count)
            return cls(start or 0, stop, 1 if stride is None else stride)
        except VideoError as error:
            raise VideoError(f"frames {text!r}: {error}; write one of {_RANGE_FORMS}") from error

    def __str__(self) -> str:
        return f"{self.start}:{'' if self.stop is None else self.stop}:{self.stride}"


@dataclass(frozen=True)
class Video:
    """Decoded frames.

    Args:
        frames: Frames, uint8 [N, H, W, 3], RGB, upright.
        fps: Frames per second of the frames kept: the source's rate divided by the stride.
        notes: Notes, one sentence for each thing that was changed while reading.
        name: Name for files that are made from this video, such as the source file's; it may be
            empty.
    """

    frames: torch.Tensor
    fps: Fraction
    notes: tuple[str, ...] = ()
    name: str = ""

    @property
    def num_frames(self) -> int:
        """The number N of frames."""
        return self.frames.shape[0]

    @property
    def height(self) -> int:
        """The height H in pixels."""
        return self.frames.shape[1]

    @property
    def width(self) -> int:
        """The width W in pixels."""
        return self.frames.shape[2]

    def parts(self, count: int) -> Iterator[torch.Tensor]:
        """The frames, `count` at a time (the last part may have fewer): uint8 [n, H, W, 3]."""
        yield from self.frames.cpu().split(count)


def usable_size(size: tuple[int, int], multiple_of: int) -> tuple[tuple[int, int], str]:
    """The largest width and height within a size that are multiples of a number.

    Args:
        size: Width and height in pixels.
        multiple_of: Number that both are to be multiples of, at least 1.

    Returns:
        Width and height, and a note of the crop; an empty one where nothing is cut.

    Raises:
        VideoError: the size is smaller than `multiple_of`.
    """
    if multiple_of < 1:
        raise VideoError(f"multiple_of must be at least 1, got {multiple_of}")
    width, height = (side // multiple_of * multiple_of for side in size)
    if 0 in (width, height):
        raise VideoError(
            f"pictures of {size_text(size)} are smaller than the least width and height of "
            f"{multiple_of}; ask for a larger size"
        )
    if (width, height) == size:
        return size, ""
    return (width, height), (
        f"{size_text(size)} was centre-cropped to {size_text((width, height))}, "
        f"because width and height must be multiples of {multiple_of}"
    )


def size_text(size: tuple[int, int]) -> str:
    """Width and height as "512x320"."""
    return f"{size[0]}x{size[1]}"
