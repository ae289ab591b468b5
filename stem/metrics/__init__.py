"""Measures of a video against another, of features over time, and of several videos together."""

from ..names import CLIP_MODEL, FLOWS
from .alignment import Embedder, clip_score, frame_accuracy, temporal_consistency, text_alignment
from .background import bounding_box, inside, outside
from .clip import Clip
from .consistency import (
    pair_warp_errors,
    similarity_maps,
    warp_error,
    warped_similarity,
    warped_ssim,
)
from .fidelity import mse, pooled_psnr, psnr, ssim
from .flow import Flow, estimate_flow, occluded
from .interval import Interval, mean_interval
from .motion import matched_motion_fidelity, motion_fidelity
from .overlap import mask_overlap
from .perceptual import Lpips, lpips
from .tracks import CoTracker, Tracker, Tracks
from .unmeasured import UnmeasuredError
from .world import WorldJudge, world_flow

__all__ = [
    "CLIP_MODEL",
    "FLOWS",
    "Clip",
    "CoTracker",
    "Embedder",
    "Flow",
    "Interval",
    "Lpips",
    "Tracker",
    "Tracks",
    "UnmeasuredError",
    "WorldJudge",
    "bounding_box",
    "clip_score",
    "estimate_flow",
    "frame_accuracy",
    "inside",
    "lpips",
    "mask_overlap",
    "matched_motion_fidelity",
    "mean_interval",
    "motion_fidelity",
    "mse",
    "occluded",
    "outside",
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
