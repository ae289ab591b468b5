"""Video models that predict a velocity: their parts, and the way along it to noise and back."""

from typing import TYPE_CHECKING

from ..exports import lazy

if TYPE_CHECKING:
    from .embedded import EmbeddedVideoModel
    from .loading import load_video_model
    from .model import VelocityModel
    from .solvers import invert_flow, noise_levels, reconstruct_flow
    from .wan import WanModel

__all__ = [
    "EmbeddedVideoModel",
    "VelocityModel",
    "WanModel",
    "invert_flow",
    "load_video_model",
    "noise_levels",
    "reconstruct_flow",
]

__getattr__, __dir__ = lazy(
    __name__,
    {
        "embedded": ("EmbeddedVideoModel",),
        "loading": ("load_video_model",),
        "model": ("VelocityModel",),
        "solvers": ("invert_flow", "noise_levels", "reconstruct_flow"),
        "wan": ("WanModel",),
    },
)
