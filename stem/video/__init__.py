"""Videos: read from any container and codec that FFmpeg decodes, written as H.264 in MP4."""

from .folder import read_pictures
from .frames import FrameRange, Video, VideoError
from .reading import VideoFile, crop_to_multiple, open_video, read_video
from .writing import check_video_output, write_video

__all__ = [
    "FrameRange",
    "Video",
    "VideoError",
    "VideoFile",
    "check_video_output",
    "crop_to_multiple",
    "open_video",
    "read_pictures",
    "read_video",
    "write_video",
]
