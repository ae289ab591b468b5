"""Video inversion and editing on diffusers, through STEM attention."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .ablation import ablate
    from .analysis import analyse
    from .attention import Handle, disable, enable, enabled
    from .comparison import compare
    from .config import InflatedConfig, PerFrameConfig, SparseCausalConfig, StemConfig
    from .editing import edit, edit_latents
    from .evaluation import evaluate
    from .inversion import InversionFolder, invert, reconstruct
    from .models import load_pipeline, random_pipeline
    from .video import Video, VideoFile, open_video, read_video, write_video

__version__ = "0.1.0"

__all__ = [
    "Handle",
    "InflatedConfig",
    "InversionFolder",
    "PerFrameConfig",
    "SparseCausalConfig",
    "StemConfig",
    "Video",
    "VideoFile",
    "ablate",
    "analyse",
    "compare",
    "disable",
    "edit",
    "edit_latents",
    "enable",
    "enabled",
    "evaluate",
    "invert",
    "load_pipeline",
    "open_video",
    "random_pipeline",
    "read_video",
    "reconstruct",
    "write_video",
]

# Each is loaded when it is first asked for, with what it needs: attention, inversions and models
# torch and diffusers; video PyAV; comparisons and evaluations also Pillow, SciPy and torchmetrics;
# analyses and ablations matplotlib, too.
_MODULES = {
    "ablation": ("ablate",),
    "analysis": ("analyse",),
    "attention": ("Handle", "disable", "enable", "enabled"),
    "comparison": ("compare",),
    "config": ("InflatedConfig", "PerFrameConfig", "SparseCausalConfig", "StemConfig"),
    "editing": ("edit", "edit_latents"),
    "evaluation": ("evaluate",),
    "inversion": ("InversionFolder", "invert", "reconstruct"),
    "models": ("load_pipeline", "random_pipeline"),
    "video": ("Video", "VideoFile", "open_video", "read_video", "write_video"),
}


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
