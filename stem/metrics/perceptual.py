"""LPIPS: how far a video is from its original in the features of a trained network."""

from __future__ import annotations

import torch

from .fidelity import frame_pairs
from .unmeasured import UnmeasuredError, check_weights, torchvision_module

LPIPS_VARIANT = "AlexNet, version 0.1"
LPIPS_MIN_SIDE = 64


@torch.inference_mode()
def lpips(video: torch.Tensor, original: torch.Tensor, device: torch.device | str = "cpu") -> float:
    """Learned perceptual distance (LPIPS_VARIANT), per frame, then the mean over frames.

    Args:
        video: Frames, uint8 [N, H, W, 3], at least LPIPS_MIN_SIDE pixels high and wide.
        original: Frames to compare with, uint8 [N, H, W, 3].
        device: Device that the network runs on.

    Returns:
        LPIPS, 0 where the frames are the same, without unit.

    Raises:
        UnmeasuredError: torchvision or AlexNet's weights are not on this machine (nothing is
            downloaded), or the frames are too small.
        ValueError: the frames have another shape or dtype, or there are none.

    Source: Zhang et al., CVPR 2018; torchmetrics, `LearnedPerceptualImagePatchSimilarity`.
    """
    pairs = frame_pairs(video, original)
    models = torchvision_module("torchvision.models")
    check_weights(models.AlexNet_Weights.DEFAULT, "torchvision.models.AlexNet_Weights")
    if min(video.shape[1:3]) < LPIPS_MIN_SIDE:
        raise UnmeasuredError(
            f"LPIPS takes frames of at least {LPIPS_MIN_SIDE} pixels a side, not "
            f"{min(video.shape[1:3])}",
            "give larger videos",
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    distance = LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True).to(device)
    for ours, theirs in pairs:
        distance.update(ours.to(device), theirs.to(device))
    return float(distance.compute())
