"""Video inversion and editing on diffusers, through STEM attention."""

from .attention import Handle, disable, enable, enabled
from .compare import compare
from .config import InflatedConfig, PerFrameConfig, SparseCausalConfig, StemConfig
from .inversion import InversionFolder, invert, reconstruct
from .models import load_pipeline, random_pipeline
from .video import Video, read_video, write_video

__version__ = "0.1.0"

__all__ = [
    "Handle",
    "InflatedConfig",
    "InversionFolder",
    "PerFrameConfig",
    "SparseCausalConfig",
    "StemConfig",
    "Video",
    "compare",
    "disable",
    "enable",
    "enabled",
    "invert",
    "load_pipeline",
    "random_pipeline",
    "read_video",
    "reconstruct",
    "write_video",
]
