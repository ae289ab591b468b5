"""Attention processors for diffusers' UNets and video transformers; turning them on and off."""

from .handle import Handle, disable, enable, enabled, plain
from .hooks import Hook, Hooks, Recording, Replay
from .parked import parking
from .video_handle import VideoHandle

__all__ = [
    "Handle",
    "Hook",
    "Hooks",
    "Recording",
    "Replay",
    "VideoHandle",
    "disable",
    "enable",
    "enabled",
    "parking",
    "plain",
]
