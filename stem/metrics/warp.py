"""Pictures and maps fetched along an optical flow."""

from __future__ import annotations

import torch
from torch.nn.functional import grid_sample


def landing(flow: torch.Tensor) -> torch.Tensor:
    """Where a flow carries each cell: (x, y) in cells, [n, h, w, 2], of a flow [n, h, w, 2]."""
    height, width = flow.shape[1:3]
    rows = torch.arange(height, device=flow.device)
    columns = torch.arange(width, device=flow.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    return torch.stack([x, y], dim=-1) + flow


def fetch(maps: torch.Tensor, flow: torch.Tensor) -> torch.Tensor:
    """The maps' values (bilinear; the rim's own outside) where the flow carries each cell.

    Args:
        maps: Maps to fetch from, [n, C, h, w], floating point.
        flow: Flow [n, h, w, 2], of the same dtype, (dx, dy) in cells.

    Returns:
        Values [n, C, h, w].
    """
    size = flow.new_tensor([flow.shape[2], flow.shape[1]])
    return grid_sample(
        maps, (2 * landing(flow) + 1) / size - 1, padding_mode="border", align_corners=False
    )
