"""The tables that the command line prints."""

from __future__ import annotations

from rich.table import Table

from ..report.cells import COMPARISON_HEADINGS, comparison_cells
from ..report.files import shown_name
from ..video import Video
from ..workflows.comparison import Comparison
from ..workflows.demo import FRAMES, Demo


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
