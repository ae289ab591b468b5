"""Measures of a video against another, of features over time, and of several videos together."""

from ..names import CLIP_MODEL, FLOWS
from .alignment import Embedder, frame_accuracy, temporal_consistency, text_alignment
from .clip import Clip
from .consistency import (
    pair_warp_errors,
    similarity_maps,
    warp_error,
    warped_similarity,
    warped_ssim,
)
from .fidelity import pooled_psnr, psnr, ssim
from .flow import Flow, estimate_flow, occluded
from .interval import Interval, mean_interval
from .overlap import mask_overlap
from .perceptual import lpips
from .unmeasured import UnmeasuredError
from .world import WorldJudge, world_flow

__all__ = [
    "CLIP_MODEL",
    "FLOWS",
    "Clip",
    "Embedder",
    "Flow",
    "Interval",
    "UnmeasuredError",
    "WorldJudge",
    "estimate_flow",
    "frame_accuracy",
    "lpips",
    "mask_overlap",
    "mean_interval",
    "occluded",
    "pair_warp_errors",
    "pooled_psnr",
    "psnr",
    "similarity_maps",
    "ssim",
    "temporal_consistency",
    "text_alignment",
    "warp_error",
    "warped_similarity",
    "warped_ssim",
    "world_flow",
]
