"""Frames of a benchmark's video, a folder of pictures or a file, read one at a time."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ...video import VideoError, VideoFile, open_video
from ...video.folder import picture_files

_PARTS = 8  # frames that are decoded at once


class Frames:
    """Frames of a folder of pictures, read by Pillow as the benchmarks do, or of a video file.

    Args:
        path: Folder or file.

    Raises:
        VideoError: there is none, or it holds no picture.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.exists():
            raise VideoError(f"{path}: no such folder or file; check the path")
        self._read: VideoFile | list[Path]
        if path.is_dir():
            self._read = picture_files(path)
            self.num_frames = len(self._read)
        else:
            self._read = open_video(path, multiple_of=1)
            self.num_frames = self._read.num_frames

    def every(self, stride: int, count: int) -> Iterator[torch.Tensor]:
        """Frame 0, `stride` ... of the first `count` frames, uint8 [H, W, 3].

        Args:
            stride: Number of frames from one to the next.
            count: Number of frames of which these are chosen.

        Raises:
            VideoError: a picture that cannot be read, or of another size than the first.
        """
        if isinstance(self._read, VideoFile):
            frames = itertools.chain.from_iterable(self._read.parts(_PARTS))
            yield from itertools.islice(frames, 0, count, stride)
            return
        size = None
        for file in self._read[:count:stride]:
            frame = torch.from_numpy(np.asarray(_picture(file, "RGB")).copy())
            size = size or frame.shape
            if frame.shape != size:
                raise VideoError(
                    f"{file}: is {_size(frame)} pixels, and the pictures before it are "
                    f"{size[1]}x{size[0]}"
                )
            yield frame

    def all(self, count: int) -> torch.Tensor:
        """The first `count` frames, uint8 [count, H, W, 3]."""
        return torch.stack(list(self.every(1, count)))


def read_masks(folder: Path, source: Frames, stride: int, count: int) -> Iterator[torch.Tensor]:
    """Masks of a source's frames, as `Frames.every` has these: true above 0, bool [H, W].

    Args:
        folder: Folder of pictures, one for each frame of the source.
        source: Source.
        stride: Number of frames from one to the next.
        count: Number of frames of which these are chosen.

    Raises:
        VideoError: no such folder, another number of pictures, or one that cannot be read.
    """
    files = picture_files(folder)
    if len(files) != source.num_frames:
        raise VideoError(
            f"{folder}: has {len(files)} masks, and the source {source.num_frames} frames"
        )
    for file in files[:count:stride]:
        yield torch.from_numpy(np.asarray(_picture(file, "L")) > 0)


def resized(frame: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A frame in the size of another by Pillow's bicubic filter, uint8 [H, W, 3]."""
    height, width = like.shape[:2]
    if frame.shape == like.shape:
        return frame
    picture = Image.fromarray(frame.numpy()).resize((width, height))
    return torch.from_numpy(np.asarray(picture).copy())


def _picture(file: Path, mode: str) -> Image.Image:
    try:
        with Image.open(file) as picture:
            return picture.convert(mode)
    except OSError as error:  # Pillow's own is one
        raise VideoError(f"{file}: cannot be read as a picture ({error})") from error


def _size(frame: torch.Tensor) -> str:
    return f"{frame.shape[1]}x{frame.shape[0]}"
