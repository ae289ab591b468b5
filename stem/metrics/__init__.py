"""Measures of a video against another."""

from .fidelity import psnr, ssim

__all__ = ["psnr", "ssim"]
