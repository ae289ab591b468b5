"""Attention processors for diffusers' UNets, and the calls that turn them on and off."""

from .handle import Handle, disable, enable, enabled, plain
from .hooks import Hook, Hooks, Recording, Replay
from .parked import parking

__all__ = [
    "Handle",
    "Hook",
    "Hooks",
    "Recording",
    "Replay",
    "disable",
    "enable",
    "enabled",
    "parking",
    "plain",
]
