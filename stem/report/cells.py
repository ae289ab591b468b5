"""Figures as texts, for tables on a page and on a terminal alike."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from .rows import AblationRow, Row

COMPARISON_HEADINGS = ("PSNR dB", "SSIM", "latent error", "invert s", "sample s", "extra MiB")
"""Headings of a comparison's figures, without the methods' own."""
SIMILARITY_HEADINGS = ("mean", "lowest", "at t")
"""Headings of a method's figures in an analysis."""
ABLATION_HEADINGS = ("PSNR dB", "SSIM", "latents", "seconds", "MiB")
"""Headings of the figures of an option's value."""


def comparison_cells(row: Row) -> list[str]:
    """A method's figures as texts, one for each of COMPARISON_HEADINGS."""
    return [
        f"{row.psnr:.2f}",
        f"{row.ssim:.3f}",
        f"{row.latent_error:.4f}",
        _seconds(row.invert_seconds, row),
        _seconds(row.reconstruct_seconds, row),
        _mebibytes(row.peak_bytes),
    ]


def similarity_cells(similarity: Mapping[int, float]) -> list[str]:
    """A method's figures as texts, one for each of SIMILARITY_HEADINGS.

    Args:
        similarity: Mean similarity by timestep.
    """
    lowest = min(similarity, key=similarity.__getitem__)
    mean = statistics.fmean(similarity.values())
    return [f"{mean:.4f}", f"{similarity[lowest]:.4f}", str(lowest)]


def ablation_cells(row: AblationRow) -> list[str]:
    """The figures of an option's value as texts, one for each of ABLATION_HEADINGS."""
    return [
        f"{row.psnr:.2f}",
        f"{row.ssim:.4f}",
        f"{row.latent_error:.4f}",
        f"{row.seconds:.1f}",
        _mebibytes(row.peak_bytes),
    ]


def _seconds(value: float | None, row: Row) -> str:
    return "reused" if value is None and row.inversion else _number(value)


def _mebibytes(count: int | None) -> str:
    return _number(None if count is None else count / 2**20)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
