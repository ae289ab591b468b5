"""Inversions of a video, their form on disk, and the way back."""

from .folder import InversionError, InversionFolder
from .invert import invert
from .methods import METHODS
from .reconstruct import reconstruct, reconstruct_latents
from .round_trip import round_trip

__all__ = [
    "METHODS",
    "InversionError",
    "InversionFolder",
    "invert",
    "reconstruct",
    "reconstruct_latents",
    "round_trip",
]
