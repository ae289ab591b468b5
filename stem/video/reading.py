"""Reading videos: any container and codec that FFmpeg decodes."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream

from .frames import FrameRange, Video, VideoError, usable_size
from .layout import Layout, parse_size, plan

Pictures = TypeVar("Pictures", bound="Video | VideoFile")

_UNEVEN = Fraction(1, 10)  # of the time between two frames
_WRONG_RATE = Fraction(1, 100)  # 30 for 29.97 fps is 0.1 % off


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: FrameRange | str | None = None,
    size: int | tuple[int, int] | str | None = None,
    multiple_of: int = 8,
) -> Video:
    """Decode a video into RGB frames, holding only the frames asked for at their final size.

    Args:
        path: File to read; the video is named after it.
        frames: Frames to keep, a `FrameRange` or its text; None keeps all.
        size: Size in pixels. None keeps the source's; an int or "256" scales the shorter side to
            it; a (width, height) or "512x320" scales to cover that size and crops the centre.
        multiple_of: Number that width and height are then centre-cropped to multiples of.

    Raises:
        TypeError: `frames` is of another type.
        VideoError: the file is absent, has no video, is damaged before the range is complete or
            has too few frames, or the range or the size cannot be used.
    """
    reader = _Reader(path, frames, size, multiple_of)
    pixels = bytearray()  # grows in place: a list of frames would need twice the memory to stack
    for picture in reader.pictures():
        pixels += picture.tobytes()
    tensor = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, reader.height, reader.width, 3)
    return Video(tensor, reader.fps, tuple(reader.notes), reader.path.stem)


def open_video(
    path: str | os.PathLike[str],
    *,
    frames: FrameRange | str | None = None,
    size: int | tuple[int, int] | str | None = None,
    multiple_of: int = 8,
) -> VideoFile:
    """A video that is decoded a few frames at a time, whenever they are asked for.

    The file is decoded once here, to check it and to count its frames; nothing is held.

    Args:
        path: File to read; it must stay as it is.
        frames: Frames to keep, as for `read_video`.
        size: Size in pixels, as for `read_video`.
        multiple_of: Number that width and height become multiples of, as for `read_video`.

    Raises:
        TypeError, VideoError: as for `read_video`.
    """
    reader = _Reader(path, frames, size, multiple_of)
    count = sum(1 for _ in reader.pictures())
    return VideoFile(
        reader.path,
        reader.asked,
        size,
        multiple_of,
        count,
        reader.height,
        reader.width,
        reader.fps,
        tuple(reader.notes),
        reader.path.stem,
    )


@dataclass(frozen=True)
class VideoFile:
    """A video whose frames stay in its file; made by `open_video`.

    Args:
        path: File.
        asked: Frames to keep.
        size: Size in pixels that was asked for.
        multiple_of: Number that width and height are multiples of.
        num_frames: Number N of frames.
        height: Height H in pixels.
        width: Width W in pixels.
        fps: Frames per second of the frames kept.
        notes: Notes, one plain sentence for each thing that is changed on the way in.
        name: Name for what is made of this video.
    """

    path: Path
    asked: FrameRange
    size: int | tuple[int, int] | str | None
    multiple_of: int
    num_frames: int
    height: int
    width: int
    fps: Fraction
    notes: tuple[str, ...] = ()
    name: str = ""

    def parts(self, count: int) -> Iterator[torch.Tensor]:
        """The frames, `count` at a time (the last part may have fewer): uint8 [n, H, W, 3].

        Raises:
            VideoError: the file has other frames than when it was opened.
        """
        reader = _Reader(self.path, self.asked, self.size, self.multiple_of)
        seen, held = 0, []
        for picture in reader.pictures():
            held.append(torch.from_numpy(picture.copy()))
            seen += 1
            if len(held) == count:
                yield torch.stack(held)
                held = []
        if held:
            yield torch.stack(held)
        if (seen, reader.height, reader.width) != (self.num_frames, self.height, self.width):
            raise VideoError(
                f"{self.path}: has changed since it was opened ({self.num_frames} frames of "
                f"{self.width}x{self.height} then, {seen} of {reader.width}x{reader.height} now); "
                "start again"
            )


class _Reader:
    """One pass over a file's frames; what is known of the video is complete at its end.

    Args:
        path: File to read.
        frames: Frames to keep, a `FrameRange` or its text; None keeps all.
        size: Size in pixels, as `read_video` takes it.
        multiple_of: Number that width and height become multiples of.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        frames: FrameRange | str | None,
        size: int | tuple[int, int] | str | None,
        multiple_of: int,
    ) -> None:
        self.path = Path(path)
        if not isinstance(frames, FrameRange | str | None):
            raise TypeError(
                f"frames is {frames!r}; pass a FrameRange or its text, such as '16' for the first "
                "16 or '8:40'"
            )
        self.asked = FrameRange.parse(frames) if isinstance(frames, str) else frames or FrameRange()
        self.notes: list[str] = []
        self.fps = Fraction(0)
        self.height = self.width = 0
        self._size = parse_size(size)
        self._multiple_of = multiple_of
        if multiple_of < 1:
            raise VideoError(f"multiple_of must be at least 1, got {multiple_of}")
        if self.path.is_dir():
            raise VideoError(f"{path}: is a folder; name a video file in it")
        if not self.path.is_file():
            raise VideoError(f"{path}: no such file; check the path")

    def pictures(self) -> Iterator[np.ndarray]:
        """The frames asked for, uint8 [H, W, 3], as they are decoded."""
        try:
            container = av.open(str(self.path))
        except av.FFmpegError as error:
            raise VideoError(
                f"{self.path}: cannot be read as a video ({error.strerror}, "
                f"{self.path.stat().st_size} bytes); check that it plays, or fetch it again"
            ) from error
        with container:
            yield from self._read(container)

    def _read(self, container: InputContainer) -> Iterator[np.ndarray]:
        path, asked = self.path, self.asked
        if not container.streams.video:
            raise VideoError(f"{path}: has no video stream; use a file with pictures in it")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise VideoError(
                f"{path}: this FFmpeg has no decoder for its codec; convert it to H.264"
            )
        rate = stream.average_rate or stream.guessed_rate
        if not rate:
            raise VideoError(f"{path}: states no frame rate; convert it with an explicit one")
        stream.thread_type = "SLICE"  # with frame threads FFmpeg hides decoding errors
        self.fps = rate / asked.stride

        wanted = range(asked.start, sys.maxsize if asked.stop is None else asked.stop, asked.stride)
        layout: Layout | None = None
        stamps: list[int | None] = []
        decoded = damaged = 0
        for frame in _decode(container, stream, path):
            index, decoded = decoded, decoded + 1
            if index not in wanted:
                continue
            if layout is None:
                aspect, multiple_of = stream.sample_aspect_ratio, self._multiple_of
                layout = plan(path, frame, aspect, self._size, multiple_of, self.notes)
                _, _, self.width, self.height = layout.crop
            damaged += bool(frame.is_corrupt)
            stamps.append(frame.pts)
            yield layout.apply(frame)
            if index == wanted[-1]:
                break
        else:
            if decoded == 0:
                raise VideoError(f"{path}: no frame could be decoded; check that it plays")
            if asked.stop is not None or layout is None:
                fix = f"a stop of at most {decoded}" if layout else f"a start below {decoded}"
                text = str(asked).removesuffix(":1")
                raise VideoError(
                    f"{path}: asked for frames {text}, the file has {decoded}; use {fix}"
                )
            if stream.frames > decoded:
                self.notes.append(
                    f"the file announces {stream.frames} frames, and only {decoded} came out"
                )
        if damaged:
            self.notes.append(
                f"frames damaged in the file, used as far as they could be decoded: {damaged}"
            )
        self.notes += _rate_notes(stamps, stream.time_base, self.fps)


def crop_to_multiple(video: Pictures, multiple_of: int) -> Pictures:
    """The centre of a video whose width and height are multiples of a number, with a note of it.

    Args:
        video: Video to crop; it is returned as it is where its size fits.
        multiple_of: Number that width and height become multiples of, at least 1.

    Raises:
        VideoError: the frames are smaller than that.
    """
    (width, height), note = usable_size((video.width, video.height), multiple_of)
    if not note:
        return video
    notes = (*video.notes, note)
    if isinstance(video, Video):
        left, top = (video.width - width) // 2, (video.height - height) // 2
        frames = video.frames[:, top : top + height, left : left + width].contiguous()
        return dataclasses.replace(video, frames=frames, notes=notes)
    return dataclasses.replace(
        video, multiple_of=multiple_of, width=width, height=height, notes=notes
    )


def _decode(container: InputContainer, stream: VideoStream, path: Path) -> Iterator[av.VideoFrame]:
    count = 0
    try:
        for frame in container.decode(stream):
            yield frame
            count += 1
    except av.FFmpegError as error:
        raise VideoError(
            f"{path}: damaged, only {count} frames could be read ({error.strerror}); "
            "use an undamaged copy, or ask for fewer frames"
        ) from error


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
