"""How close a video is to its original, frame by frame: PSNR and SSIM."""

from __future__ import annotations

import torch

SSIM_WINDOW = 11
"""Pixels of a side of SSIM's window, the least height and width of frames."""
SSIM_VARIANT = f"Gaussian window {SSIM_WINDOW}x{SSIM_WINDOW}, sigma 1.5, RGB"


def psnr(video: torch.Tensor, original: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB: per frame, then the mean over frames.

    Args:
        video: Frames, uint8 [N, H, W, 3]; the data range is 1 after division by 255.
        original: Frames to compare with, uint8 [N, H, W, 3].

    Returns:
        PSNR in dB; inf as soon as one frame is exact, since its own PSNR is.

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

    Not the mean over frames that `psnr` is: a mask may leave a frame without a pixel.

    Args:
        video: Frames, uint8 [N, H, W, 3]; the data range is 1 after division by 255.
        original: Frames to compare with, uint8 [N, H, W, 3].
        mask: Mask of the pixels that count, bool [N, H, W]; None: all.

    Returns:
        PSNR in dB; inf where all of these pixels are exact.

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


def ssim(video: torch.Tensor, original: torch.Tensor) -> float:
    """Structural similarity (SSIM_VARIANT), per frame, then the mean over frames; at most 1.

    Args:
        video: Frames, uint8 [N, H, W, 3], at least SSIM_WINDOW pixels high and wide.
        original: Frames to compare with, uint8 [N, H, W, 3].

    Returns:
        SSIM, without unit.

    Raises:
        ValueError: another shape or dtype, no frames, or frames smaller than the window.

    Source: torchmetrics, `structural_similarity_index_measure`.
    """
    values = [pictures_ssim(ours, theirs) for ours, theirs in frame_pairs(video, original)]
    return sum(values) / len(values)


def pictures_ssim(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Structural similarity (SSIM_VARIANT) of two pictures, float [1, 3, H, W] in 0 ... 1.

    Raises:
        ValueError: they are smaller than SSIM_WINDOW pixels a side.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    if min(ours.shape[2:]) < SSIM_WINDOW:
        raise ValueError(
            f"SSIM's window is {SSIM_WINDOW}x{SSIM_WINDOW}; frames of {list(ours.shape[2:])} are "
            "smaller"
        )
    value = structural_similarity_index_measure(
        ours, theirs, gaussian_kernel=True, sigma=1.5, kernel_size=SSIM_WINDOW, data_range=1.0
    )
    assert isinstance(value, torch.Tensor)
    return float(value)


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
