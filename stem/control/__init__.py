"""What a ControlNet is shown of a video: pictures, and how much of them counts."""

from .control import Control
from .depth import depth
from .edges import canny

__all__ = ["Control", "canny", "depth"]
