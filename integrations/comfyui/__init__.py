"""Nodes of ComfyUI: a UNet's self-attention over EM bases, and DDIM inversion."""

from .attention import StemAttention
from .inversion import StemInvert

NODE_CLASS_MAPPINGS = {"StemAttention": StemAttention, "StemInvert": StemInvert}
NODE_DISPLAY_NAME_MAPPINGS = {"StemAttention": "STEM attention", "StemInvert": "STEM invert"}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
