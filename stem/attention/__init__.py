"""Attention processors for diffusers' UNets, and the calls that turn them on and off."""

from .handle import Handle, disable, enable, enabled, plain

__all__ = ["Handle", "disable", "enable", "enabled", "plain"]
