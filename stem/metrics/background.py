"""Frames inside and outside a mask, as benchmarks of edits compare them."""

from __future__ import annotations

import torch

from .unmeasured import UnmeasuredError


def outside(frames: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Frames that are black inside a mask.

    Two videos that are both black there are then compared over all pixels, so the pixels of the
    mask count as equal: PSNR is higher than over the background alone, by -10 log10 of the
    background's share of the pixels.

    Args:
        frames: Frames, uint8 [N, H, W, 3].
        masks: Masks, true where a frame is edited, bool [N, H, W].

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        ValueError: masks of another shape or dtype.

    Source: FiVE, arXiv 2503.13684, and PIE-Bench, arXiv 2310.01506, in their released code.
    """
    _check(frames, masks)
    return frames.masked_fill(masks[..., None], 0)


def inside(frames: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Frames that are black outside a mask.

    Args:
        frames: Frames, uint8 [N, H, W, 3].
        masks: Masks, true where a frame is edited, bool [N, H, W].

    Returns:
        uint8 [N, H, W, 3].

    Raises:
        ValueError: masks of another shape or dtype.
    """
    _check(frames, masks)
    return frames.masked_fill(~masks[..., None], 0)


def bounding_box(masks: torch.Tensor) -> torch.Tensor:
    """The box around the masks of all frames; its last row and column are left out, as in FiVE.

    Args:
        masks: Masks, bool [N, H, W].

    Returns:
        bool [H, W].

    Raises:
        UnmeasuredError: the box is empty.
    """
    found = masks.any(0).nonzero()
    box = torch.zeros(masks.shape[1:], dtype=torch.bool)
    if len(found):
        (top, left), (bottom, right) = found.amin(0).tolist(), found.amax(0).tolist()
        box[top:bottom, left:right] = True
    if not box.any():
        raise UnmeasuredError("the masks have no box", "give masks of at least 2x2 pixels")
    return box


def _check(frames: torch.Tensor, masks: torch.Tensor) -> None:
    if masks.dtype != torch.bool or masks.shape != frames.shape[:3]:
        raise ValueError(
            f"the masks are {masks.dtype} {list(masks.shape)}; frames of {list(frames.shape)} need "
            f"bool {list(frames.shape[:3])}"
        )
