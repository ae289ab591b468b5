"""Attention processors for diffusers' UNets and video transformers; turning them on and off."""

from .handle import Handle, disable, enable, enabled, plain
from .layers.hooks import Hook, Hooks, Recording, Replay
from .video_handle import VideoHandle
from .waiting.parked import parking

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
