"""Measures of a video against another, of features over time, and of several videos together."""

from .consistency import pair_warp_errors, warp_error, warped_similarity
from .fidelity import pooled_psnr, psnr, ssim
from .interval import Interval, mean_interval
from .overlap import mask_overlap

__all__ = [
    "Interval",
    "mask_overlap",
    "mean_interval",
    "pair_warp_errors",
    "pooled_psnr",
    "psnr",
    "ssim",
    "warp_error",
    "warped_similarity",
]
