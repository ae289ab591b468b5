"""Self-attention of video transformers: the whole, its parts, and their merge."""

from ..ops.partial_attention import merged_attention
from ..ops.placed_attention import placed_attention
from ..ops.video_attention import video_attention
from ..ops.video_bases import video_bases
from ..ops.window_attention import window_attention

__all__ = [
    "merged_attention",
    "placed_attention",
    "video_attention",
    "video_bases",
    "window_attention",
]
