"""Reading videos: any container and codec that FFmpeg decodes."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import av
import torch
from av.container import InputContainer
from av.video.stream import VideoStream

from .frames import FrameRange, Video, VideoError
from .layout import Layout, parse_size, plan

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
        VideoError: the file is absent, has no video, is damaged before the range is complete or
            has too few frames, or the range or the size cannot be used.
    """
    path = Path(path)
    asked = FrameRange.parse(frames) if isinstance(frames, str) else frames or FrameRange()
    wanted_size = parse_size(size)
    if multiple_of < 1:
        raise VideoError(f"multiple_of must be at least 1, got {multiple_of}")
    if path.is_dir():
        raise VideoError(f"{path}: is a folder; name a video file in it")
    if not path.is_file():
        raise VideoError(f"{path}: no such file; check the path")
    try:
        container = av.open(str(path))
    except av.FFmpegError as error:
        raise VideoError(
            f"{path}: cannot be read as a video ({error.strerror}, {path.stat().st_size} bytes); "
            "check that it plays, or fetch it again"
        ) from error
    with container:
        return _read(container, path, asked, wanted_size, multiple_of)


def _read(
    container: InputContainer,
    path: Path,
    asked: FrameRange,
    size: int | tuple[int, int] | None,
    multiple_of: int,
) -> Video:
    if not container.streams.video:
        raise VideoError(f"{path}: has no video stream; use a file with pictures in it")
    stream = container.streams.video[0]
    if stream.codec_context is None:
        raise VideoError(f"{path}: this FFmpeg has no decoder for its codec; convert it to H.264")
    rate = stream.average_rate or stream.guessed_rate
    if not rate:
        raise VideoError(f"{path}: states no frame rate; convert it with an explicit one")
    stream.thread_type = "SLICE"  # with frame threads FFmpeg hides decoding errors

    notes: list[str] = []
    wanted = range(asked.start, sys.maxsize if asked.stop is None else asked.stop, asked.stride)
    layout: Layout | None = None
    pixels = bytearray()  # grows in place: a list of frames would need twice the memory to stack
    stamps: list[int | None] = []
    decoded = damaged = 0
    for frame in _decode(container, stream, path):
        index, decoded = decoded, decoded + 1
        if index not in wanted:
            continue
        if layout is None:
            layout = plan(path, frame, stream.sample_aspect_ratio, size, multiple_of, notes)
        damaged += bool(frame.is_corrupt)
        stamps.append(frame.pts)
        pixels += layout.apply(frame).tobytes()
        if index == wanted[-1]:
            break
    else:
        if decoded == 0:
            raise VideoError(f"{path}: no frame could be decoded; check that it plays")
        if asked.stop is not None or layout is None:
            fix = f"a stop of at most {decoded}" if layout else f"a start below {decoded}"
            text = str(asked).removesuffix(":1")
            raise VideoError(f"{path}: asked for frames {text}, the file has {decoded}; use {fix}")
        if stream.frames > decoded:
            notes.append(f"the file announces {stream.frames} frames, and only {decoded} came out")
    if damaged:
        notes.append(f"frames damaged in the file, used as far as they could be decoded: {damaged}")
    notes += _rate_notes(stamps, stream.time_base, rate / asked.stride)
    _, _, width, height = layout.crop
    tensor = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3)
    return Video(tensor, rate / asked.stride, tuple(notes), path.stem)


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
