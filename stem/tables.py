"""The tables that the command line prints."""

from __future__ import annotations

from rich.table import Table

from .compare import Comparison
from .demo import FRAMES, Demo
from .video import Video


def comparison_table(found: Comparison, clip: Video) -> Table:
    """A row for each method, and for the autoencoder alone."""
    count, height, width, _ = clip.frames.shape
    table = Table(title=f"{count} frames, {width}x{height}")
    table.add_column("method")
    for heading in ("PSNR dB", "SSIM", "latent error", "invert s", "sample s", "extra MiB"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in found.rows:
        table.add_row(
            _shown(row.method),
            f"{row.psnr:.2f}",
            f"{row.ssim:.3f}",
            f"{row.latent_error:.4f}",
            "reused"
            if row.invert_seconds is None and row.inversion
            else _number(row.invert_seconds),
            _number(row.reconstruct_seconds),
            _number(None if row.peak_bytes is None else row.peak_bytes / 2**20),
        )
    return table


def demo_table(found: Demo, size: int) -> Table:
    """The same over the world videos, with intervals, beside the natural clip."""
    *world, natural = found.comparisons
    table = Table(title=f"{len(world)} world videos and {natural}, {FRAMES} frames, {size}x{size}")
    table.add_column("method")
    for heading in ("world PSNR dB", "world SSIM", f"{natural} PSNR dB", "SSIM"):
        table.add_column(heading, justify="right")
    for row in found.comparisons[natural].rows:
        table.add_row(
            _shown(row.method),
            f"{found.psnr[row.method]:.2f}",
            f"{found.ssim[row.method]:.3f}",
            f"{row.psnr:.2f}",
            f"{row.ssim:.3f}",
        )
    return table


def _shown(method: str) -> str:
    return "vae alone" if method == "vae" else method


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
