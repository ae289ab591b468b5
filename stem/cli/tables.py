"""The tables that the command line prints, and the cells that a report's page shares with them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping

from rich.table import Table

from ..report.files import shown_name
from ..video import Video
from ..workflows.ablation import AblationRow
from ..workflows.comparison import Comparison
from ..workflows.demo import FRAMES, Demo
from ..workflows.measuring import Row

COMPARISON_HEADINGS = ("PSNR dB", "SSIM", "latent error", "invert s", "sample s", "extra MiB")
"""Headings of a comparison's figures, without the methods' own."""
SIMILARITY_HEADINGS = ("mean", "lowest", "at t")
"""Headings of a method's figures in an analysis."""
ABLATION_HEADINGS = ("PSNR dB", "SSIM", "latents", "seconds", "MiB")
"""Headings of the figures of an option's value."""


def comparison_table(found: Comparison, clip: Video) -> Table:
    """A row for each method, and for the autoencoder alone."""
    count, height, width, _ = clip.frames.shape
    table = Table(title=f"{count} frames, {width}x{height}")
    table.add_column("method")
    for heading in COMPARISON_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(shown_name(row.method), *comparison_cells(row))
    return table


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


def demo_table(found: Demo, size: int) -> Table:
    """The same over the world videos, with intervals, beside the natural clip."""
    *world, natural = found.comparisons
    table = Table(title=f"{len(world)} world videos and {natural}, {FRAMES} frames, {size}x{size}")
    table.add_column("method")
    for heading in ("world PSNR dB", "world SSIM", f"{natural} PSNR dB", "SSIM"):
        table.add_column(heading, justify="right")
    for row in found.comparisons[natural].rows:
        table.add_row(
            shown_name(row.method),
            f"{found.psnr[row.method]:.2f}",
            f"{found.ssim[row.method]:.3f}",
            f"{row.psnr:.2f}",
            f"{row.ssim:.3f}",
        )
    return table


def _seconds(value: float | None, row: Row) -> str:
    return "reused" if value is None and row.inversion else _number(value)


def _mebibytes(count: int | None) -> str:
    return _number(None if count is None else count / 2**20)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
