"""What a file's frames are beside pictures, counted as they are read, and said at the end."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import pairwise

import av

from .frames import size_text

_UNEVEN = Fraction(1, 10)  # of the time between two frames
_WRONG_RATE = Fraction(1, 100)  # 30 for 29.97 fps is 0.1 % off


@dataclass
class Tally:
    """What the frames that were kept have shown so far; `add` counts one more.

    Args:
        size: Width and height that the first of them is stored in; None before there is one.
        other_sizes: Numbers, in the file, and sizes of the frames that are stored in another one.
        damaged: Number of frames that the decoder found damaged.
        interlaced: Number of frames that are two fields of different moments.
        transparent: Whether a pixel is not opaque.
        stamps: Times of the frames, in ticks.
        tick: Seconds that a tick takes.
    """

    size: tuple[int, int] | None = None
    other_sizes: list[tuple[int, tuple[int, int]]] = field(default_factory=list)
    damaged: int = 0
    interlaced: int = 0
    transparent: bool = False
    stamps: list[int | None] = field(default_factory=list)
    tick: Fraction | None = None

    def add(self, number: int, frame: av.VideoFrame) -> None:
        """Count a frame, of this number in the file."""
        size = (frame.width, frame.height)
        self.size = self.size or size
        if size != self.size:
            self.other_sizes.append((number, size))
        self.damaged += bool(frame.is_corrupt)
        self.interlaced += bool(frame.interlaced_frame)
        self.transparent = self.transparent or _is_transparent(frame)
        self.stamps.append(frame.pts)
        self.tick = frame.time_base

    def notes(self) -> Iterator[str]:
        """A plain sentence for each thing that a picture does not show."""
        if self.size and self.other_sizes:
            number, size = self.other_sizes[0]
            yield (
                f"the size changes within the file: the frames of another than "
                f"{size_text(self.size)}, {len(self.other_sizes)} from frame {number} "
                f"({size_text(size)}) on, were scaled and centre-cropped to it"
            )
        if self.transparent:
            yield (
                "the pictures are transparent in places, and were read as if they were opaque; to "
                "have black there, first run ffmpeg -i FILE -vf premultiply=inplace=1,"
                "format=yuv444p opaque.mp4"
            )
        if self.interlaced:
            yield (
                f"{self.interlaced} frames are interlaced and were read as they are, with combs "
                "where something moves; to have them right, read them with deinterlace=True "
                "(--deinterlace)"
            )
        if self.damaged:
            yield (
                f"frames damaged in the file, used as far as they could be decoded: {self.damaged}"
            )

    def rate_notes(self, fps: Fraction) -> Iterator[str]:
        """Say so where frames do not come evenly, or not at the rate that they are shown at."""
        return _rate_notes(self.stamps, self.tick, fps)


def _is_transparent(frame: av.VideoFrame) -> bool:
    """Whether a pixel is not opaque."""
    if not (frame.format.has_palette or any(part.is_alpha for part in frame.format.components)):
        return False
    return bool(frame.reformat(format="rgba").to_ndarray()[..., 3].min() < 255)


def _rate_notes(
    stamps: Sequence[int | None], tick: Fraction | None, fps: Fraction
) -> Iterator[str]:
    """Say so where frames do not come evenly, or not at the rate that they will be shown at.

    Time stamps are whole numbers of ticks, up to one beside the exact time. That, and the jitter
    of a stamp that another container had rounded, does not make a rate vary.
    """
    known = [stamp for stamp in stamps if stamp is not None]
    if not tick or len(known) < len(stamps) or len(known) < 3 or known[-1] <= known[0]:
        return
    gap = Fraction(known[-1] - known[0], len(known) - 1)
    strayed = max(abs(stamp - known[0] - gap * index) for index, stamp in enumerate(known))
    gaps = [1000 * float((after - before) * tick) for before, after in pairwise(known)]
    if strayed > max(Fraction(1), _UNEVEN * gap):
        yield (
            f"the frame rate varies: frames are {min(gaps):.1f} to {max(gaps):.1f} ms apart, and "
            f"were taken as {float(fps):.5g} a second"
        )
    elif abs(gap * tick * fps - 1) > _WRONG_RATE + 1 / (gap * (len(known) - 1)):
        yield (
            f"the frames come at {float(1 / (gap * tick)):.5g} a second, and were taken as "
            f"{float(fps):.5g}, the rate that the file states"
        )
