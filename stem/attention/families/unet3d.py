"""ModelScope's text to video: samples [branch and video, channel, frame, h, w]."""

from __future__ import annotations

from .family import Family

UNET_3D = Family(
    "UNet3DConditionModel", frame_axis=2, temporal=("transformer_in", "temp_attentions")
)
