"""Masks on the grids of a UNet's layers: bool or shares, [N, h, w]."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch.nn.functional import max_pool2d

logger = logging.getLogger("stem")

LEAST, MOST = 0.005, 0.9
"""Shares of a video's cells outside of which a mask is hardly meant."""


def layer_size(num_tokens: int, height: int, width: int) -> tuple[int, int]:
    """The height and width of a layer with so many tokens, halved from the latents'.

    Args:
        num_tokens: Number of tokens of a frame in the layer.
        height: Height of the latents.
        width: Width of the latents.

    Raises:
        ValueError: no halving of the latents has so many.
    """
    size = (height, width)
    while size[0] * size[1] > num_tokens:
        size = ((size[0] + 1) // 2, (size[1] + 1) // 2)
    if size[0] * size[1] != num_tokens:
        raise ValueError(
            f"a layer has {num_tokens} tokens a frame, and no halving of the latents' "
            f"{height}x{width} has; this UNet's layers cannot be masked"
        )
    return size


def halvings(unet: Any, name: str) -> int | None:
    """How often the grid of an attention, by its name, is halved; None in the UNet's middle."""
    side, index, *_ = name.split(".")
    if side == "down_blocks":
        return int(index)
    return len(unet.up_blocks) - 1 - int(index) if side == "up_blocks" else None


def dilated(mask: torch.Tensor, cells: int) -> torch.Tensor:
    """A mask grown by some cells in every direction, bool [N, h, w]."""
    grown = max_pool2d(mask.float().unsqueeze(1), 2 * cells + 1, 1, cells)
    return grown.squeeze(1).bool()


def warn_of_size(masks: torch.Tensor) -> None:
    """Warn where masks cover next to nothing of a video, or nearly all of it."""
    share = float(masks.float().mean())
    if not LEAST <= share <= MOST:
        logger.warning(
            "the edit's masks cover %.1f %% of the video: %s",
            100 * share,
            "nearly nothing will change; make the prompts say more plainly what is to change"
            if share < LEAST
            else "nearly everything may change; use an edit without masks, or a higher threshold",
        )
