"""SparseCtrl, AnimateDiff's ControlNet: samples [branch and video, channel, frame, h, w]."""

from __future__ import annotations

from .family import Family

SPARSE_CONTROLNET = Family("SparseControlNetModel", frame_axis=2, temporal=("motion_modules",))
