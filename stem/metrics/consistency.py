"""How steady features are over time: along the optical flow, they should stay what they are."""

from __future__ import annotations

import torch
from torch.nn.functional import cosine_similarity, grid_sample


def warped_similarity(features: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor) -> float:
    """Cosine similarity of features with those that the flow leads to, in the next frame.

    The features of frame t + 1 are fetched (bilinearly) from where the flow carries each cell of
    frame t, and compared with the cell's own. Cells that are not seen in frame t + 1 do not count.

    Args:
        features: Features [N, C, h, w], floating point, N >= 2.
        flow: Flow [N-1, h, w, 2], floating point, (dx, dy) in cells, from each frame to the next.
        occlusion: Mask [N-1, h, w], bool, True where the cell is not seen in the next frame.

    Returns:
        Mean over all cells seen, computed in float32, at most 1.

    Raises:
        ValueError: the shapes do not belong together, or no cell is seen.

    Source: the feature analysis of arXiv 2312.05856 (its Figure 5), which warps forward.
    """
    frames, _, height, width = features.shape
    expected = (frames - 1, height, width)
    if flow.shape != (*expected, 2) or occlusion.shape != expected:
        raise ValueError(
            f"features of shape {list(features.shape)} need a flow of {[*expected, 2]} and an "
            f"occlusion of {list(expected)}, not {list(flow.shape)} and {list(occlusion.shape)}"
        )
    if occlusion.all():
        raise ValueError("no cell of any frame is seen in the next; there is nothing to compare")
    rows = torch.arange(height, device=flow.device)
    columns = torch.arange(width, device=flow.device)
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    targets = torch.stack([x, y], dim=-1) + flow
    size = flow.new_tensor([width, height])
    fetched = grid_sample(
        features[1:].float(),
        (2 * targets + 1) / size - 1,
        padding_mode="border",
        align_corners=False,
    )
    similarity = cosine_similarity(features[:-1].float(), fetched, dim=1)
    return float(similarity[~occlusion].mean())
