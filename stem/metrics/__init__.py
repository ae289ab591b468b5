"""Measures of a video against another, of features over time, and of several videos together."""

from .consistency import warped_similarity
from .fidelity import psnr, ssim
from .interval import Interval, mean_interval

__all__ = ["Interval", "mean_interval", "psnr", "ssim", "warped_similarity"]
