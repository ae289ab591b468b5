"""Inversions of a video, their form on disk, and the way back."""

from typing import TYPE_CHECKING

from ..exports import lazy

if TYPE_CHECKING:
    from ..flow import invert_flow, noise_levels, reconstruct_flow
    from .flow_inverting import invert_video, keep_source
    from .flow_reconstructing import reconstruct_video, reconstruct_video_latents
    from .folder import InversionError, InversionFolder
    from .inverting import invert
    from .methods import METHODS
    from .reconstructing import reconstruct, reconstruct_latents
    from .round_trips import round_trip

__all__ = [
    "METHODS",
    "InversionError",
    "InversionFolder",
    "invert",
    "invert_flow",
    "invert_video",
    "keep_source",
    "noise_levels",
    "reconstruct",
    "reconstruct_flow",
    "reconstruct_latents",
    "reconstruct_video",
    "reconstruct_video_latents",
    "round_trip",
]

# Those who look after folders on disk, `stem list` among them, need no torch.
__getattr__, __dir__ = lazy(
    __name__,
    {
        ".flow": ("invert_flow", "noise_levels", "reconstruct_flow"),
        "flow_inverting": ("invert_video", "keep_source"),
        "flow_reconstructing": ("reconstruct_video", "reconstruct_video_latents"),
        "folder": ("InversionError", "InversionFolder"),
        "inverting": ("invert",),
        "methods": ("METHODS",),
        "reconstructing": ("reconstruct", "reconstruct_latents"),
        "round_trips": ("round_trip",),
    },
)
