"""Video inversion and editing on diffusers, through STEM attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .exports import lazy

if TYPE_CHECKING:
    from .attention import Handle, VideoHandle, disable, enable, enabled, parking
    from .config import (
        InflatedConfig,
        PerFrameConfig,
        SparseCausalConfig,
        StemConfig,
        VideoConfig,
    )
    from .control import Control
    from .editing import edit, edit_latents
    from .inversion import InversionFolder, invert, reconstruct
    from .models import load_pipeline, random_pipeline
    from .video import Video, VideoFile, find_cuts, open_video, read_video, write_video
    from .workflows.ablation import ablate
    from .workflows.analysis import analyse
    from .workflows.benchmark import evaluate_benchmark
    from .workflows.comparison import compare
    from .workflows.dense import dense_edit
    from .workflows.evaluation import evaluate

__version__ = "0.1.0"

__all__ = [
    "Control",
    "Handle",
    "InflatedConfig",
    "InversionFolder",
    "PerFrameConfig",
    "SparseCausalConfig",
    "StemConfig",
    "Video",
    "VideoConfig",
    "VideoFile",
    "VideoHandle",
    "ablate",
    "analyse",
    "compare",
    "dense_edit",
    "disable",
    "edit",
    "edit_latents",
    "enable",
    "enabled",
    "evaluate",
    "evaluate_benchmark",
    "find_cuts",
    "invert",
    "load_pipeline",
    "open_video",
    "parking",
    "random_pipeline",
    "read_video",
    "reconstruct",
    "write_video",
]

# Each is loaded when it is first asked for, with what it needs: torch, and PyAV, Pillow, SciPy,
# torchmetrics or matplotlib. diffusers and transformers are loaded with a pipeline.
_MODULES = {
    "workflows.ablation": ("ablate",),
    "workflows.analysis": ("analyse",),
    "attention": ("Handle", "VideoHandle", "disable", "enable", "enabled", "parking"),
    "workflows.benchmark": ("evaluate_benchmark",),
    "workflows.comparison": ("compare",),
    "config": (
        "InflatedConfig",
        "PerFrameConfig",
        "SparseCausalConfig",
        "StemConfig",
        "VideoConfig",
    ),
    "control": ("Control",),
    "workflows.dense": ("dense_edit",),
    "editing": ("edit", "edit_latents"),
    "workflows.evaluation": ("evaluate",),
    "inversion": ("InversionFolder", "invert", "reconstruct"),
    "models": ("load_pipeline", "random_pipeline"),
    "video": ("Video", "VideoFile", "find_cuts", "open_video", "read_video", "write_video"),
}


__getattr__, __dir__ = lazy(__name__, _MODULES)
