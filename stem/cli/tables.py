"""The tables that the command line prints."""

from __future__ import annotations

from rich.table import Table

from ..report.cells import (
    ABLATION_HEADINGS,
    COMPARISON_HEADINGS,
    SIMILARITY_HEADINGS,
    ablation_cells,
    comparison_cells,
    similarity_cells,
)
from ..report.files import shown_name
from ..video import Video
from ..workflows.ablation import Ablation
from ..workflows.analysis import Analysis
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


def analysis_table(found: Analysis) -> Table:
    """A row for each method: the mean similarity, and the lowest with its timestep."""
    table = Table(title="cosine similarity of the last self-attention's features")
    table.add_column("method")
    for heading in SIMILARITY_HEADINGS:
        table.add_column(heading, justify="right")
    for method, curve in found.curves.items():
        table.add_row(method, *similarity_cells(curve.similarity))
    return table


def ablation_table(found: Ablation) -> Table:
    """A row for each value of each option."""
    table = Table()
    table.add_column("option", no_wrap=True)
    table.add_column("value", no_wrap=True)
    for heading in ABLATION_HEADINGS:
        table.add_column(heading, justify="right", no_wrap=True)
    previous = ""
    for row in found.rows:
        if previous and row.option != previous:
            table.add_section()
        table.add_row(
            "" if row.option == previous else row.option,
            f"{row.value} *" if row.is_base else row.value,
            *ablation_cells(row),
        )
        previous = row.option
    return table
