"""AnimateDiff on Stable Diffusion 1.5 and XL: samples [branch and video, channel, frame, h, w]."""

from __future__ import annotations

from .family import Family

# A block of a motion module has two self-attentions, both along frames.
MOTION = Family("UNetMotionModel", frame_axis=2, temporal=("motion_modules",))
