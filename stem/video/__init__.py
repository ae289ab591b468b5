"""Videos: read from any container and codec that FFmpeg decodes, written as H.264 in MP4."""

from .frames import FrameRange, Video, VideoError, crop_to_multiple
from .reading import read_video
from .writing import check_video_output, write_video

__all__ = [
    "FrameRange",
    "Video",
    "VideoError",
    "check_video_output",
    "crop_to_multiple",
    "read_video",
    "write_video",
]
