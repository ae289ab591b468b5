"""How close a video is to its original, frame by frame: PSNR, squared error and SSIM."""

from __future__ import annotations

import torch

SSIM_WINDOW = 11
"""Pixels of a side of SSIM's window, the least height and width of frames."""
_SIGMA = 1.5
SSIM_VARIANT = f"Gaussian window {SSIM_WINDOW}x{SSIM_WINDOW}, sigma {_SIGMA}, RGB, float64"


def psnr(video: torch.Tensor, original: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB: per frame, then the mean over frames.

    Args:
        video: Frames, uint8 [N, H, W, 3]; the data range is 1 after division by 255.
        original: Frames to compare with, uint8 [N, H, W, 3].

    Returns:
        PSNR in dB; inf if one frame equals the original, because the PSNR of that frame is inf.

    Raises:
        ValueError: another shape or dtype, or no frames.

    Source: torchmetrics, `peak_signal_noise_ratio`.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio  # it takes a second

    values = [
        float(peak_signal_noise_ratio(ours, theirs, data_range=1.0))
        for ours, theirs in frame_pairs(video, original)
    ]
    return sum(values) / len(values)


def pooled_psnr(
    video: torch.Tensor, original: torch.Tensor, mask: torch.Tensor | None = None
) -> float:
    """Peak signal-to-noise ratio in dB of all pixels of a video together, or of those of a mask.

    Unlike `psnr`, it is not a mean over frames, because a mask may leave a frame without a pixel.

    Args:
        video: Frames, uint8 [N, H, W, 3]; the data range is 1 after division by 255.
        original: Frames to compare with, uint8 [N, H, W, 3].
        mask: Mask of the pixels that count, bool [N, H, W]; None: all.

    Returns:
        PSNR in dB; inf if all of these pixels equal the original.

    Raises:
        ValueError: another shape or dtype, no frames, or a mask without a pixel.
    """
    pairs = frame_pairs(video, original)
    squared = torch.cat([(ours - theirs).square().mean(dim=1) for ours, theirs in pairs])
    if mask is not None:
        if mask.dtype != torch.bool or mask.shape != squared.shape:
            raise ValueError(
                f"the mask is {mask.dtype} {list(mask.shape)}; frames of {list(video.shape)} need "
                f"bool {list(squared.shape)}"
            )
        if not mask.any():
            raise ValueError("the mask has no pixel; there is nothing to compare")
        squared = squared[mask]
    return float(-10 * squared.double().mean().log10())


def mse(video: torch.Tensor, original: torch.Tensor) -> float:
    """Mean squared difference of all pixels; frames are of one size, so it is the frames' mean.

    Args:
        video: Frames, uint8 [N, H, W, 3]; the data range is 1 after division by 255.
        original: Frames to compare with, uint8 [N, H, W, 3].

    Returns:
        0 ... 1, without unit.

    Raises:
        ValueError: another shape or dtype, or no frames.
    """
    values = [float((x - y).square().mean()) for x, y in frame_pairs(video, original)]
    return sum(values) / len(values)


def ssim(video: torch.Tensor, original: torch.Tensor) -> float:
    """Structural similarity (SSIM_VARIANT), per frame, then the mean over frames; at most 1.

    Frames that are the same have exactly 1.

    Args:
        video: Frames, uint8 [N, H, W, 3], at least SSIM_WINDOW pixels high and wide.
        original: Frames to compare with, uint8 [N, H, W, 3].

    Returns:
        SSIM, without unit.

    Raises:
        ValueError: another shape or dtype, no frames, or frames smaller than the window.

    Source: Wang et al., IEEE TIP 13(4), 2004; rims as in torchmetrics 1.9's
    `structural_similarity_index_measure`, whose float64 agrees (1.4 cuts them off).
    """
    values = [pictures_ssim(ours, theirs) for ours, theirs in frame_pairs(video, original)]
    return sum(values) / len(values)


def pictures_ssim(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Structural similarity (SSIM_VARIANT) of two pictures, float [1, 3, H, W] in 0 ... 1.

    Returns:
        SSIM, at most 1, and exactly 1 of the same pictures.

    Raises:
        ValueError: they are smaller than SSIM_WINDOW pixels a side.
    """
    if min(ours.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM's window is {SSIM_WINDOW}x{SSIM_WINDOW}; frames of {list(ours.shape[2:])} are "
            "smaller"
        )
    channels = zip(ours[0].double(), theirs[0].double(), strict=True)
    means = [float(_ssim_map(x, y).mean()) for x, y in channels]
    return min(1.0, sum(means) / len(means))  # rounding alone may lead past 1


def _ssim_map(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """SSIM at every pixel of one channel, float64 [H, W]."""
    mean_x, mean_y, xx, yy, xy = _blurred(torch.stack([x, y, x * x, y * y, x * y]))
    products, squares = mean_x * mean_y, mean_x.square() + mean_y.square()
    # Differences of large numbers: in float32 they are 0.3 % off where pictures are flat.
    covariance, variances = xy - products, xx + yy - squares
    luminance, contrast = 0.01**2, 0.03**2  # the constants of the paper
    similar = (2 * products + luminance) * (2 * covariance + contrast)
    return similar / ((squares + luminance) * (variances + contrast))


def _blurred(maps: torch.Tensor) -> torch.Tensor:
    """Maps [n, H, W] under SSIM's window, with their rims reflected."""
    radius = SSIM_WINDOW // 2
    weights = torch.exp(-(torch.arange(-radius, radius + 1).double() / _SIGMA).square() / 2)
    weights = weights / weights.sum()
    # One side after the other, which is much faster than a convolution in float64.
    for side in (1, 2):
        length = maps.shape[side]
        padding = (0, 0, radius, radius) if side == 1 else (radius, radius, 0, 0)
        padded = torch.nn.functional.pad(maps[None], padding, mode="reflect")[0]
        maps = torch.zeros_like(maps)
        for offset, weight in enumerate(weights.tolist()):
            maps.add_(padded.narrow(side, offset, length), alpha=weight)
    return maps


def frame_pairs(
    video: torch.Tensor, original: torch.Tensor
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    if video.shape != original.shape:
        raise ValueError(
            f"the videos differ in shape: {list(video.shape)} and {list(original.shape)}"
        )
    if video.shape[0] == 0:
        raise ValueError("the videos have no frames")
    for frames in (video, original):
        if frames.dtype != torch.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
            raise ValueError(
                f"frames must be uint8 [N, H, W, 3], not {frames.dtype} {list(frames.shape)}"
            )
    pictures = [frames.permute(0, 3, 1, 2).float() / 255 for frames in (video, original)]
    return [
        (ours[None], theirs[None]) for ours, theirs in zip(pictures[0], pictures[1], strict=True)
    ]
