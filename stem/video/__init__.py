"""Videos: read from any container and codec that FFmpeg decodes, written as H.264 in MP4."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ..exports import lazy

if TYPE_CHECKING:
    from .cuts import find_cuts
    from .folder import read_pictures
    from .frames import FrameRange, Video, VideoError
    from .reading import VideoFile, crop_to_multiple, open_video, read_video
    from .writing import check_video_output, write_video, writing_video

__all__ = [
    "FrameRange",
    "Video",
    "VideoError",
    "VideoFile",
    "check_video_output",
    "crop_to_multiple",
    "find_cuts",
    "open_video",
    "read_pictures",
    "read_video",
    "write_video",
    "writing_video",
]

# Where a clip lies is known without torch and PyAV.
_MODULES = {
    "cuts": ("find_cuts",),
    "folder": ("read_pictures",),
    "frames": ("FrameRange", "Video", "VideoError"),
    "reading": ("VideoFile", "crop_to_multiple", "open_video", "read_video"),
    "writing": ("check_video_output", "write_video", "writing_video"),
}


__getattr__, __dir__ = lazy(__name__, _MODULES)
