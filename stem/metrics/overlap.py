"""How well a mask fits the true one."""

from __future__ import annotations

import torch


def mask_overlap(mask: torch.Tensor, truth: torch.Tensor) -> float:
    """Intersection over union (IoU) of two masks, 0 ... 1, over all frames at once.

    Args:
        mask: Mask, bool [N, h, w].
        truth: Mask to compare with, bool [N, h, w].

    Raises:
        ValueError: another shape or dtype, or both masks are empty.
    """
    if mask.shape != truth.shape:
        raise ValueError(f"the masks differ in shape: {list(mask.shape)} and {list(truth.shape)}")
    for given in (mask, truth):
        if given.dtype != torch.bool:
            raise ValueError(f"masks must be bool, not {given.dtype}; compare with a threshold")
    either = int((mask | truth).sum())
    if either == 0:
        raise ValueError("both masks are empty; their overlap is not defined")
    return int((mask & truth).sum()) / either
