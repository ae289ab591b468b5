"""Writing videos: H.264 in MP4."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from av.container import OutputContainer
from av.video.stream import VideoStream

from ..storage import check_output_file, replacing
from .layout import SCALER

_BT601 = 6  # AVCOL_SPC_SMPTE170M, what swscale makes of RGB unless told otherwise
_LIMITED_RANGE = 1  # AVCOL_RANGE_MPEG


def write_video(
    path: str | os.PathLike[str],
    frames: torch.Tensor | Iterable[torch.Tensor],
    fps: Fraction | float,
) -> None:
    """Encode frames as H.264 in MP4 at high quality (CRF 12). Parent folders are made.

    Args:
        path: File to write, ending in ".mp4". It appears only when it is complete: an interrupted
            run leaves no partial file.
        frames: Frames, uint8 [N, H, W, 3], RGB, on any device. An odd width or height is padded by
            repeating the last column or row, because 4:2:0 video has even sizes only. Also an
            iterable of such tensors, which are the parts of a video in order.
        fps: Frames per second, 0.001 to 10000; a Fraction is kept exactly, a float to the nearest
            fraction with a denominator of at most 1001.

    Raises:
        TypeError: `frames` or `fps` is of another type.
        ValueError: frames of another shape or dtype, no frames, or an unusable path or fps.
        OSError: the file cannot be written.
    """
    if not isinstance(frames, Iterable):
        raise TypeError(f"frames is a {type(frames).__name__}; pass tensors, such as video.frames")
    with writing_video(path, fps) as append:
        for part in [frames] if isinstance(frames, torch.Tensor) else frames:
            append(part)


@contextlib.contextmanager
def writing_video(
    path: str | os.PathLike[str], fps: Fraction | float
) -> Iterator[Callable[[torch.Tensor], None]]:
    """A function that appends a part of the frames, for a `with` block: `write_video` by parts.

    Args:
        path: File to write, as for `write_video`; it appears when the block ends.
        fps: Frames per second, likewise.

    Returns:
        A context manager of the function, which takes uint8 [n, H, W, 3].

    Raises:
        TypeError, ValueError, OSError: as `write_video`.
    """
    path = Path(path)
    _check_name(path)
    check_output_file(path)
    if not isinstance(fps, Fraction | float | int):
        raise TypeError(f"fps is {fps!r}; pass a number, such as video.fps")
    if not 0.001 <= fps <= 10_000:
        raise ValueError(f"fps must be between 0.001 and 10000, got {fps}")
    rate = fps if isinstance(fps, Fraction) else Fraction(fps).limit_denominator(1001)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial, _mp4(partial) as container:
        encoder = _Encoder(container, rate)
        yield encoder.append
        encoder.end()


class _Encoder:
    """Frames on their way into a container, the size of the first one."""

    def __init__(self, container: OutputContainer, rate: Fraction) -> None:
        self._container, self._rate = container, rate
        self._stream: VideoStream | None = None
        self._size: list[int] = []
        self._count = 0

    def append(self, frames: torch.Tensor) -> None:
        """Encode uint8 [n, H, W, 3]."""
        _check_frames(frames)
        size = list(frames.shape[1:])
        if self._stream is None:
            self._stream, self._size = self._stream_of(size), size
        if size != self._size:
            raise ValueError(f"the frames change their size, from {self._size} to {size}")
        padding = ((0, size[0] % 2), (0, size[1] % 2), (0, 0))
        for picture in frames:
            padded = np.pad(picture.cpu().numpy(), padding, mode="edge")
            frame = av.VideoFrame.from_ndarray(padded, format="rgb24")
            frame = frame.reformat(format="yuv420p", interpolation=SCALER)
            frame.pts, frame.time_base = self._count, 1 / self._rate
            self._container.mux(self._stream.encode(frame))
            self._count += 1

    def end(self) -> None:
        """Encode what the encoder still holds."""
        if self._stream is None:
            raise ValueError("frames is empty; there must be at least one part with a frame")
        self._container.mux(self._stream.encode())

    def _stream_of(self, size: list[int]) -> VideoStream:
        # swscale puts chroma midway between luma samples; untagged, it is read as beside one.
        options = {"crf": "12", "chroma_sample_location": "center"}
        # x264's AVX-512 code for macroblock trees goes past the end of a row of macroblocks: with
        # them, equal frames give other files by what the memory held before.
        options["mbtree"] = "0"
        stream = self._container.add_stream("libx264", rate=self._rate, options=options)
        stream.height, stream.width = (side + side % 2 for side in size[:2])
        stream.pix_fmt = "yuv420p"
        # Players take large untagged video for BT.709, which would shift the colours.
        stream.codec_context.colorspace = _BT601
        stream.codec_context.color_range = _LIMITED_RANGE
        return stream


def _mp4(path: Path) -> OutputContainer:
    # Absolute, for FFmpeg takes what stands before a colon for a protocol.
    return av.open(str(path.absolute()), "w", format="mp4")


def _check_frames(frames: torch.Tensor) -> None:
    if not isinstance(frames, torch.Tensor):
        raise TypeError(
            f"frames holds a {type(frames).__name__}; pass a tensor, such as torch.from_numpy "
            "gives, or several"
        )
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(
            "frames must be uint8 [N, H, W, 3] with N, H, W >= 1, "
            f"got {str(frames.dtype).removeprefix('torch.')} {list(frames.shape)}"
        )


def check_video_output(path: Path, num_frames: int, height: int, width: int) -> None:
    """Check, before any work, that `write_video` can write a file.

    Args:
        path: File that is to be written.
        num_frames: Number of its frames.
        height: Height in pixels.
        width: Width in pixels.

    Raises:
        ValueError: it does not end in ".mp4".
        OSError: it is a folder, its folder refuses files, or the disk has too little space.
    """
    _check_name(path)
    check_output_file(path, most_bytes(num_frames, height, width))


def most_bytes(num_frames: int, height: int, width: int) -> int:
    """The most bytes that a written video of so many pixels takes."""
    # Pure noise takes 0.92 bytes a pixel and 0.8 KB a frame beside them, real clips less than 0.1.
    return num_frames * (height * width + 1024) + 4096


def _check_name(path: Path) -> None:
    if path.suffix.lower() != ".mp4":
        raise ValueError(f"{path}: only MP4 is written; use a name that ends in .mp4")
