"""Reading and writing videos: any container and codec that FFmpeg decodes, H.264 in MP4 out."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream

_RANGE_FORMS = '"16" (the first 16), "8:40", "8:40:2", ":16", "10:", "::4"'
_SIZE_FORMS = 'an integer or "256" (the shorter side), or (width, height) or "512x320"'
_BT709 = 1  # AVCOL_SPC_BT709, the value of frame.colorspace
_BT601 = 6  # AVCOL_SPC_SMPTE170M, what swscale makes of RGB unless told otherwise
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG
# SWS_BICUBIC | SWS_FULL_CHR_H_INT | SWS_ACCURATE_RND. Without the last two swscale repeats the
# chroma samples of 4:2:0 video, which costs some 14 dB on smooth pictures.
_SCALER = 0x4 | 0x2000 | 0x40000


class VideoError(ValueError):
    """A video file that cannot be used, or a request that it cannot fulfil."""


@dataclass(frozen=True)
class FrameRange:
    """The frames `start, start + stride, ...` before `stop` (None: to the end), as in a slice.

    Raises VideoError unless 0 <= start < stop and stride >= 1.
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

    frames: uint8 [N, H, W, 3], RGB, upright.
    fps: frames per second of the frames kept, which is the source's rate over the stride.
    notes: one plain sentence for each thing that was changed on the way in.
    """

    frames: torch.Tensor
    fps: Fraction
    notes: tuple[str, ...] = ()

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


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: FrameRange | str | None = None,
    size: int | tuple[int, int] | str | None = None,
    multiple_of: int = 8,
) -> Video:
    """Decode a video into RGB frames, holding only the frames asked for at their final size.

    frames: which frames to keep, a `FrameRange` or its text; None keeps all.
    size: pixels. None keeps the source's size; an int or "256" scales the shorter side to it; a
        (width, height) or "512x320" scales to cover that size and crops the centre.
    multiple_of: width and height are then centre-cropped down to multiples of this.

    Raises VideoError if the file is absent, has no video, is damaged before the range is complete,
    or has too few frames, and if the range or the size cannot be used.
    """
    path = Path(path)
    asked = FrameRange.parse(frames) if isinstance(frames, str) else frames or FrameRange()
    wanted_size = _parse_size(size)
    if multiple_of < 1:
        raise VideoError(f"multiple_of must be at least 1, got {multiple_of}")
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


def write_video(path: str | os.PathLike[str], frames: torch.Tensor, fps: Fraction | float) -> None:
    """Encode frames as H.264 in MP4 at high quality (CRF 12), making the parent folders.

    path: must end in ".mp4". It appears only when complete: a killed run leaves no half file.
    frames: uint8 [N, H, W, 3], RGB, on any device. An odd width or height is padded by repeating
        the last column or row, because 4:2:0 video has even sizes only.
    fps: frames per second, 0.001 to 10000; a Fraction is kept exactly, a float to the nearest
        fraction with a denominator of at most 1001.

    Raises ValueError for frames of another shape or dtype, no frames, or an unusable path or fps.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: only MP4 is written; use a name that ends in .mp4")
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            "frames must be uint8 [N, H, W, 3] with N, H, W >= 1, "
            f"got {str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        )
    if not 0.001 <= fps <= 10_000:
        raise ValueError(f"fps must be between 0.001 and 10000, got {fps}")
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)

    height, width = frames.shape[1:3]
    padding = ((0, height % 2), (0, width % 2), (0, 0))
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with av.open(str(partial), "w", format="mp4") as container:
            # swscale puts chroma midway between luma samples; untagged, it is read as beside one.
            options = {"crf": "12", "chroma_sample_location": "center"}
            stream = container.add_stream("libx264", rate=rate, options=options)
            stream.width, stream.height = width + width % 2, height + height % 2
            stream.pix_fmt = "yuv420p"
            # Players take large untagged video for BT.709, which would shift the colours.
            stream.codec_context.colorspace = _BT601
            stream.codec_context.color_range = _LIMITED_RANGE
            for index, picture in enumerate(frames):
                padded = np.pad(picture.cpu().numpy(), padding, mode="edge")
                frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
                frame = frame.reformat(format="yuv420p", interpolation=_SCALER)
                frame.pts, frame.time_base = index, 1 / rate
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


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
    layout: _Layout | None = None
    pixels = bytearray()  # grows in place: a list of frames would need twice the memory to stack
    decoded = damaged = 0
    for frame in _decode(container, stream, path):
        index, decoded = decoded, decoded + 1
        if index not in wanted:
            continue
        if layout is None:
            layout = _plan(path, frame, stream.sample_aspect_ratio, size, multiple_of, notes)
        damaged += bool(frame.is_corrupt)
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
    _, _, width, height = layout.crop
    tensor = torch.frombuffer(pixels, dtype=torch.uint8).view(-1, height, width, 3)
    return Video(tensor, rate / asked.stride, tuple(notes))


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


@dataclass(frozen=True)
class _Layout:
    """How a stored frame becomes a picture; chosen at the first one and kept for all of them."""

    swapped: bool  # rows and columns are exchanged, then read with these steps (1 or -1)
    steps: tuple[int, int]
    scaled: tuple[int, int]  # width and height of the upright picture before the crop
    crop: tuple[int, int, int, int]  # left, top, width, height

    def apply(self, frame: av.VideoFrame) -> np.ndarray:
        # PyAV before 17 converts BT.709 as if it were BT.601 unless both ends are named.
        source, target = ("ITU709", "DEFAULT") if frame.colorspace == _BT709 else (None, None)
        width, height = reversed(self.scaled) if self.swapped else self.scaled
        rgb = frame.reformat(width, height, "rgb24", source, target, interpolation=_SCALER)
        picture = rgb.to_ndarray()
        if self.swapped:
            picture = picture.swapaxes(0, 1)
        step_x, step_y = self.steps
        left, top, width, height = self.crop
        return picture[::step_y, ::step_x][top : top + height, left : left + width]


def _plan(
    path: Path,
    frame: av.VideoFrame,
    pixel_aspect: Fraction | None,
    size: int | tuple[int, int] | None,
    multiple_of: int,
    notes: list[str],
) -> _Layout:
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
    filled = size if isinstance(size, tuple) else scaled
    final = (filled[0] // multiple_of * multiple_of, filled[1] // multiple_of * multiple_of)
    if 0 in final:
        raise VideoError(
            f"{path}: pictures of {_text(filled)} are smaller than the least width and height of "
            f"{multiple_of}; ask for a larger size"
        )
    if scaled != shown:
        notes.append(f"{_text(shown)} was resized to {_text(scaled)}, to give the size asked for")
    if filled != scaled:
        notes.append(f"{_text(scaled)} was centre-cropped to {_text(filled)}, the size asked for")
    if final != filled:
        notes.append(
            f"{_text(filled)} was centre-cropped to {_text(final)}, "
            f"because width and height must be multiples of {multiple_of}"
        )
    left, top = (scaled[0] - final[0]) // 2, (scaled[1] - final[1]) // 2
    return _Layout(swapped, (step_x, step_y), scaled, (left, top, *final))


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


def _parse_size(size: int | tuple[int, int] | str | None) -> int | tuple[int, int] | None:
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
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
