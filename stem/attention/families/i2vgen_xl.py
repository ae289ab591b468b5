"""I2VGen-XL: samples and image latents [branch and video, channel, frame, h, w]."""

from __future__ import annotations

from .family import Family

I2VGEN_XL = Family(
    "I2VGenXLUNet",
    frame_axis=2,
    temporal=("transformer_in", "temp_attentions", "image_latents_temporal_encoder"),
)
