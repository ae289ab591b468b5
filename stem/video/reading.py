"""Reading videos: any container and codec that FFmpeg decodes."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

import av
import numpy as np
import torch
from av.container import InputContainer
from av.video.stream import VideoStream

from .deinterlacing import DEINTERLACED, deinterlaced
from .frames import FrameRange, Video, VideoError, usable_size
from .layout import Layout, parse_size, plan
from .streams import colour_notes, frame_rate, hdr_transfer, holds_times, video_stream
from .tally import Tally

Pictures = TypeVar("Pictures", bound="Video | VideoFile")


def read_video(
    path: str | os.PathLike[str],
    *,
    frames: FrameRange | str | None = None,
    size: int | tuple[int, int] | str | None = None,
    multiple_of: int = 8,
    deinterlace: bool = False,
    tone_map: bool = False,
) -> Video:
    """Decode a video into RGB frames. Only the frames asked for are held, at their final size.

    Args:
        path: File to read; the video is named after it.
        frames: Frames to keep, a `FrameRange` or its text; None keeps all.
        size: Size in pixels. None keeps the source's; an int or "256" scales the shorter side to
            it; a (width, height) or "512x320" scales to cover that size and crops the centre.
        multiple_of: Number; width and height are then centre-cropped to multiples of it.
        deinterlace: Whether to deinterlace. A frame that holds two fields of different moments then
            shows the first field alone; its missing lines are interpolated (FFmpeg's filter bwdif).
        tone_map: Whether HDR pictures (PQ or HLG, of BT.2020's colours) are made SDR: by BT.2390's
            curve, of which 1,000 nits are white. SDR pictures stay as they are.

    The video's notes name what its pictures do not show: a frame rate that varies, transparency,
    interlaced frames, HDR that is read as SDR and the like. If the file does not name the matrix of
    its colours, BT.709 is used from 720 lines on, as in players, and BT.601 below.

    Raises:
        TypeError: `frames` is of another type.
        VideoError: the file is absent, has no video, is damaged before the range is complete or
            has too few frames, or the range, the size or `tone_map` cannot be used.
    """
    reader = _Reader(path, frames, size, multiple_of, deinterlace, tone_map)
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
    deinterlace: bool = False,
    tone_map: bool = False,
) -> VideoFile:
    """Open a video whose frames are decoded a few at a time, when they are needed.

    This call decodes the file once, to check it and to count its frames; it keeps no frame.

    Args:
        path: File to read; it must not change afterwards.
        frames: Frames to keep, as for `read_video`.
        size: Size in pixels, as for `read_video`.
        multiple_of: Number that width and height become multiples of, as for `read_video`.
        deinterlace: Whether frames are deinterlaced, as for `read_video`.
        tone_map: Whether HDR pictures are made SDR, as for `read_video`.

    Raises:
        TypeError, VideoError: as for `read_video`.
    """
    reader = _Reader(path, frames, size, multiple_of, deinterlace, tone_map)
    count = sum(1 for _ in reader.pictures())
    return VideoFile(
        reader.path,
        reader.asked,
        size,
        multiple_of,
        deinterlace,
        tone_map,
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
        deinterlace: Whether frames are deinterlaced.
        tone_map: Whether HDR pictures are made SDR.
        num_frames: Number N of frames.
        height: Height H in pixels.
        width: Width W in pixels.
        fps: Frames per second of the frames kept.
        notes: Notes, one sentence for each thing that is changed while reading.
        name: Name for files that are made from this video.
    """

    path: Path
    asked: FrameRange
    size: int | tuple[int, int] | str | None
    multiple_of: int
    deinterlace: bool
    tone_map: bool
    num_frames: int
    height: int
    width: int
    fps: Fraction
    notes: tuple[str, ...] = ()
    name: str = ""

    def parts(self, count: int) -> Iterator[torch.Tensor]:
        """The frames, `count` at a time (the last part may have fewer): uint8 [n, H, W, 3].

        Raises:
            VideoError: the frames of the file have changed since it was opened.
        """
        reader = _Reader(
            self.path, self.asked, self.size, self.multiple_of, self.deinterlace, self.tone_map
        )
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
        deinterlace: Whether frames are deinterlaced.
        tone_map: Whether HDR pictures are made SDR.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        frames: FrameRange | str | None,
        size: int | tuple[int, int] | str | None,
        multiple_of: int,
        deinterlace: bool,
        tone_map: bool,
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
        self._deinterlace = deinterlace
        self._tone_map = tone_map
        if multiple_of < 1:
            raise VideoError(f"multiple_of must be at least 1, got {multiple_of}")
        if self.path.is_dir():
            raise VideoError(f"{path}: is a folder; name a video file in it")
        if not self.path.is_file():
            raise VideoError(f"{path}: no such file; check the path")

    def pictures(self) -> Iterator[np.ndarray]:
        """The frames asked for, uint8 [H, W, 3], as they are decoded."""
        try:
            # Absolute, for FFmpeg takes what stands before a colon for a protocol.
            container = av.open(str(self.path.absolute()))
        except av.FFmpegError as error:
            raise VideoError(
                f"{self.path}: cannot be read as a video ({error.strerror}, "
                f"{self.path.stat().st_size} bytes); check that it plays, or fetch it again"
            ) from error
        with container:
            yield from self._read(container)

    def _read(self, container: InputContainer) -> Iterator[np.ndarray]:
        path, asked = self.path, self.asked
        stream = video_stream(container, path, self.notes)
        self.fps = frame_rate(container, stream, path, self.notes) / asked.stride
        stream.thread_type = "SLICE"  # with frame threads FFmpeg hides decoding errors

        wanted = range(asked.start, sys.maxsize if asked.stop is None else asked.stop, asked.stride)
        layout: Layout | None = None
        tally = Tally()
        decoded = 0
        frames = _decode(container, stream, path)
        if self._deinterlace:
            frames = deinterlaced(frames)
            self.notes.append(DEINTERLACED)
        for frame in frames:
            index, decoded = decoded, decoded + 1
            if index not in wanted:
                continue
            if layout is None:
                aspect, multiple_of = stream.sample_aspect_ratio, self._multiple_of
                layout = plan(path, frame, aspect, self._size, multiple_of, self.notes)
                self.notes += colour_notes(stream.codec_context, tone_map=self._tone_map)
                if self._tone_map:
                    layout = dataclasses.replace(
                        layout, hdr=hdr_transfer(stream.codec_context, path)
                    )
                _, _, self.width, self.height = layout.crop
            tally.add(index, frame)
            try:
                picture = layout.apply(frame)
            except VideoError as error:
                raise VideoError(f"{path}: {error}") from error
            yield picture
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
        self.notes += tally.notes()
        if holds_times(container):
            self.notes += tally.rate_notes(self.fps)


def crop_to_multiple(video: Pictures, multiple_of: int) -> Pictures:
    """Crop a video around its centre to a width and height that are multiples of a number.

    The result's notes say what was cropped.

    Args:
        video: Video to crop; it is returned unchanged if its size fits.
        multiple_of: Number that width and height become multiples of, at least 1.

    Raises:
        VideoError: the frames are smaller than `multiple_of`.
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
