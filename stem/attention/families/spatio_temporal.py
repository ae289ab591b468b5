"""Stable Video Diffusion: samples [branch and video, frame, channel, h, w]."""

from __future__ import annotations

from .family import Family

SPATIO_TEMPORAL = Family(
    "UNetSpatioTemporalConditionModel", frame_axis=1, temporal=("temporal_transformer_blocks",)
)
