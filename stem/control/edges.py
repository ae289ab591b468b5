"""Edges of frames, which a ControlNet on edges is shown."""

from __future__ import annotations

import torch

LOW, HIGH = 100, 200
"""Thresholds of Canny's gradients, those of the ControlNets' authors."""


def canny(frames: torch.Tensor, low: float = LOW, high: float = HIGH) -> torch.Tensor:
    """Canny's edges of every frame, by OpenCV.

    Args:
        frames: Frames, uint8 [N, H, W, 3].
        low: Gradient above which an edge goes on, at least 0.
        high: Gradient above which an edge begins, at least `low`.

    Returns:
        uint8 [N, H, W, 3] on the CPU, white edges on black.

    Raises:
        ValueError: frames of another dtype or shape, thresholds that do not fit, or OpenCV is not
            installed.

    Source: Canny 1986, IEEE PAMI-8(6); thresholds as in arXiv 2302.05543, the released code.
    """
    check_frames(frames)
    if not 0 <= low <= high < float("inf"):
        raise ValueError(f"thresholds are {low} and {high}; they must be 0 <= low <= high")
    try:
        import cv2
    except ImportError as error:
        raise ValueError(
            "edges need OpenCV, which is not installed; pip install opencv-python-headless"
        ) from error
    found = [
        torch.from_numpy(cv2.Canny(frame.contiguous().numpy(), low, high)) for frame in frames.cpu()
    ]
    return torch.stack(found).unsqueeze(3).expand(-1, -1, -1, 3).contiguous()


def check_frames(frames: torch.Tensor) -> None:
    """Raise ValueError where frames are not uint8 [N, H, W, 3] with N at least 1."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3 or not len(frames):
        raise ValueError(
            f"frames are {frames.dtype} {list(frames.shape)}; they must be uint8 [N, H, W, 3]"
        )
