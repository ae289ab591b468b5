"""PSNR and SSIM against their definitions; peak memory against what was allocated."""

from __future__ import annotations

import math

import pytest
import torch

from stem.metrics import psnr, ssim
from stem_kernels.measure import PeakMemory


def frames(count: int = 3, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (count, size, size, 3), generator=generator, dtype=torch.uint8)


def test_psnr_is_the_mean_over_frames() -> None:
    original = frames()
    changed = original.clone()
    changed[0] ^= 1  # each value of frame 0 is off by one
    changed[1] ^= 8
    one, two = (20 * math.log10(255 / off) for off in (1, 8))
    assert psnr(changed[:1], original[:1]) == pytest.approx(one, abs=1e-3)
    assert psnr(changed[:2], original[:2]) == pytest.approx((one + two) / 2, abs=1e-3)
    assert psnr(original, original) == math.inf


def test_ssim() -> None:
    original = frames()
    assert ssim(original, original) == pytest.approx(1.0, abs=1e-6)
    assert ssim(255 - original, original) < 0
    flat = torch.full_like(original, 100)
    # Constant pictures leave the luminance term alone: (2 a b + c) / (a^2 + b^2 + c).
    a, b, c = 100 / 255, 120 / 255, 0.01**2
    expected = (2 * a * b + c) / (a * a + b * b + c)
    assert ssim(flat, flat + 20) == pytest.approx(expected, abs=1e-4)


def test_videos_that_cannot_be_compared() -> None:
    with pytest.raises(ValueError, match=r"differ in shape: \[3, 24, 24, 3\] and \[2, 24, 24, 3\]"):
        psnr(frames(3), frames(2))
    with pytest.raises(ValueError, match="must be uint8"):
        psnr(frames().float(), frames().float())
    with pytest.raises(ValueError, match="have no frames"):
        psnr(frames(0), frames(0))
    with pytest.raises(ValueError, match="window is 11x11"):
        ssim(frames(size=8), frames(size=8))


def test_peak_memory_counts_what_was_held_at_once() -> None:
    torch.zeros(20_000_000)  # freed before the measurement; must not hide the next ones
    with PeakMemory("cpu") as memory:
        for _ in range(3):
            torch.ones(20_000_000)
    assert memory.extra_bytes is not None
    assert 75e6 < memory.extra_bytes < 100e6
