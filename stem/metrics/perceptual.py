"""LPIPS: how far a video is from its original in the features of a trained network."""

from __future__ import annotations

from typing import Any, Literal

import torch

from .fidelity import frame_pairs
from .unmeasured import UnmeasuredError, check_weights, torchvision_module

LPIPS_MIN_SIDE = 64
_VERSION = "version 0.1"
_NETWORKS = {"alex": "AlexNet", "squeeze": "SqueezeNet1_1"}  # torchvision's names
LPIPS_VARIANT = f"AlexNet, {_VERSION}"
"""What `lpips` measures with."""


class Lpips:
    """Learned perceptual distance (LPIPS) by one network, which is loaded once.

    Args:
        network: Network of the features, "alex" or "squeeze".
        device: Device that the network runs on.

    Raises:
        UnmeasuredError: torchvision or the network's weights are not on this machine (nothing is
            downloaded).

    Source: Zhang et al., CVPR 2018; torchmetrics, `LearnedPerceptualImagePatchSimilarity`.
    """

    def __init__(
        self, network: Literal["alex", "squeeze"] = "alex", device: torch.device | str = "cpu"
    ) -> None:
        name = _NETWORKS[network]
        weights = getattr(torchvision_module("torchvision.models"), f"{name}_Weights")
        check_weights(weights.DEFAULT, f"torchvision.models.{name}_Weights")
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        self._distance: Any = LearnedPerceptualImagePatchSimilarity(
            net_type=network, normalize=True
        ).to(device)
        self._device = device
        self.variant = f"{name}, {_VERSION}"

    @torch.inference_mode()
    def __call__(self, video: torch.Tensor, original: torch.Tensor) -> float:
        """The distance per frame, then the mean over frames.

        Args:
            video: Frames, uint8 [N, H, W, 3], at least LPIPS_MIN_SIDE pixels high and wide.
            original: Frames to compare with, uint8 [N, H, W, 3].

        Returns:
            LPIPS, 0 where the frames are the same, without unit.

        Raises:
            UnmeasuredError: the frames are too small.
            ValueError: the frames have another shape or dtype, or there are none.
        """
        pairs = frame_pairs(video, original)
        if min(video.shape[1:3]) < LPIPS_MIN_SIDE:
            raise UnmeasuredError(
                f"LPIPS takes frames of at least {LPIPS_MIN_SIDE} pixels a side, not "
                f"{min(video.shape[1:3])}",
                "give larger videos",
            )
        self._distance.reset()
        for ours, theirs in pairs:
            self._distance.update(ours.to(self._device), theirs.to(self._device))
        return float(self._distance.compute())


def lpips(video: torch.Tensor, original: torch.Tensor, device: torch.device | str = "cpu") -> float:
    """Learned perceptual distance (LPIPS_VARIANT) as `Lpips` measures it.

    Args:
        video: Frames, uint8 [N, H, W, 3], at least LPIPS_MIN_SIDE pixels high and wide.
        original: Frames to compare with, uint8 [N, H, W, 3].
        device: Device that the network runs on.

    Raises:
        UnmeasuredError, ValueError: as `Lpips`.
    """
    frame_pairs(video, original)
    return Lpips("alex", device)(video, original)
