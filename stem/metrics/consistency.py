"""How steady pictures and features are: along the optical flow, they should stay what they are."""

from __future__ import annotations

import statistics

import torch
from torch.nn.functional import cosine_similarity

from .fidelity import pictures_ssim
from .warp import fetch


def warped_similarity(features: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor) -> float:
    """Cosine similarity of features with the features that the flow leads to in the next frame.

    The flow carries each cell of frame t to a place in frame t + 1. The features there (bilinear)
    are compared with the features of the cell. Cells that are not seen in frame t + 1 do not count.

    Args:
        features: Features [N, C, h, w], floating point, N >= 2.
        flow: Flow [N-1, h, w, 2], floating point, (dx, dy) in cells, from each frame to the next.
        occlusion: Mask [N-1, h, w], bool, True where the cell is not seen in the next frame.

    Returns:
        Mean over all cells seen, computed in float32, at most 1.

    Raises:
        ValueError: the shapes do not fit together, or no cell is seen.

    Source: the feature analysis of arXiv 2312.05856 (its Figure 5), which warps forward.
    """
    similarity = similarity_maps(features, flow, occlusion)
    if occlusion.all():
        raise ValueError("no cell of any frame is seen in the next; there is nothing to compare")
    return float(similarity[~occlusion].mean())


def similarity_maps(
    features: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor
) -> torch.Tensor:
    """Cosine similarity of each cell with the place that the flow leads to.

    `warped_similarity` is their mean over the cells that both frames show.

    Args:
        features: Features [N, C, h, w], floating point, N >= 2.
        flow: Flow [N-1, h, w, 2], floating point, (dx, dy) in cells, from each frame to the next.
        occlusion: Mask [N-1, h, w], bool, True where the cell is not seen in the next frame.

    Returns:
        float32 [N-1, h, w]; it includes cells that are not seen in the next frame.

    Raises:
        ValueError: the shapes do not fit together.
    """
    fetched = _fetched(features.float(), flow, occlusion)
    return cosine_similarity(features[:-1].float(), fetched, dim=1)


def warp_error(frames: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor) -> float:
    """Warp-Err: the mean of `pair_warp_errors`.

    Args:
        frames: Frames, uint8 [N, H, W, 3], N >= 2.
        flow: Flow [N-1, H, W, 2], floating point, (dx, dy) in pixels, from each frame to the next.
        occlusion: Mask [N-1, H, W], bool, True where a pixel is not seen in the next frame.

    Raises:
        ValueError: as `pair_warp_errors`.
    """
    return statistics.fmean(pair_warp_errors(frames, flow, occlusion))


def pair_warp_errors(
    frames: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor
) -> list[float]:
    r"""1000 x the mean squared difference of each frame and the next one warped onto it.

    $$1000 \, \textstyle\sum M_t |V_t - \mathrm{warp}(V_{t+1})|^2 / \sum M_t$$

    Args:
        frames: Frames, uint8 [N, H, W, 3], N >= 2; the data range is 1 after division by 255, and
            the square is the mean over the three channels.
        flow: Flow [N-1, H, W, 2], floating point, (dx, dy) in pixels, from each frame to the next.
        occlusion: Mask [N-1, H, W], bool, True where a pixel is not seen in the next frame; M is
            its complement.

    Returns:
        Errors of the N-1 pairs, at least 0.

    Raises:
        ValueError: the shapes do not fit together, a dtype is another, or a pair has no pixel that
            is seen in both frames.
    """
    pictures = _pictures(frames)
    squared = (pictures[:-1] - _fetched(pictures, flow, occlusion)).square().mean(dim=1)
    for pair, hidden in enumerate(occlusion):
        if hidden.all():
            raise ValueError(f"no pixel of frame {pair} is seen in the next; leave that pair out")
    return [
        1000 * float(error[~hidden].mean())
        for error, hidden in zip(squared, occlusion, strict=True)
    ]


def warped_ssim(frames: torch.Tensor, backward: torch.Tensor) -> float:
    """WarpSSIM: structural similarity of each frame, warped by a flow, with the next frame.

    Each pixel of frame t + 1 is fetched (bilinearly) from the place in frame t that the backward
    flow leads to. All pixels count, including occluded ones. SSIM is the variant SSIM_VARIANT.

    Args:
        frames: Frames, uint8 [N, H, W, 3], N >= 2, at least SSIM_WINDOW pixels high and wide.
        backward: Flow [N-1, H, W, 2], floating point, (dx, dy) in pixels, from each frame but the
            first to the frame before.

    Returns:
        Mean over the N-1 pairs, at most 1.

    Raises:
        ValueError: the shapes do not fit together, a dtype is another, or the frames are too small.

    Source: Kara et al., RAVE, CVPR 2024, WarpSSIM.
    """
    pictures = _pictures(frames)
    count, height, width, _ = frames.shape
    if backward.shape != (count - 1, height, width, 2) or count < 2:
        raise ValueError(
            f"{count} frames of {height}x{width}, at least 2, need a backward flow of "
            f"{[count - 1, height, width, 2]}, not {list(backward.shape)}"
        )
    warped = fetch(pictures[:-1], backward)
    pairs = zip(warped[:, None], pictures[1:, None], strict=True)
    return statistics.fmean(pictures_ssim(ours, theirs) for ours, theirs in pairs)


def _pictures(frames: torch.Tensor) -> torch.Tensor:
    """Frames uint8 [N, H, W, 3] as float32 [N, 3, H, W] in 0 ... 1."""
    if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(
            f"frames must be uint8 [N, H, W, 3], not {frames.dtype} {list(frames.shape)}"
        )
    return frames.permute(0, 3, 1, 2).float() / 255


def _fetched(maps: torch.Tensor, flow: torch.Tensor, occlusion: torch.Tensor) -> torch.Tensor:
    """The next frame's values (bilinear) where the flow carries each cell, [N-1, C, h, w]."""
    frames, _, height, width = maps.shape
    expected = (frames - 1, height, width)
    if flow.shape != (*expected, 2) or occlusion.shape != expected or frames < 2:
        raise ValueError(
            f"{frames} frames of {height}x{width}, at least 2, need a flow of {[*expected, 2]} and "
            f"an occlusion of {list(expected)}, not {list(flow.shape)} and {list(occlusion.shape)}"
        )
    return fetch(maps[1:], flow)
