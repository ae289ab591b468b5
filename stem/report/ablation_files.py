"""The files of an ablation: figures, and a plot of them by option."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .files import write_figure

_PANELS = {
    "PSNR dB": lambda row: row["psnr"],
    "SSIM": lambda row: row["ssim"],
    "seconds": lambda row: row["seconds"],
    "extra MiB": lambda row: None if row["peak_bytes"] is None else row["peak_bytes"] / 2**20,
}


def ablation_files(folder: Path) -> tuple[Path, Path]:
    """Paths of ablation.json and ablation.png in a folder."""
    return folder / "ablation.json", folder / "ablation.png"


def write_plot(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Plot PSNR, SSIM, time and memory, a line of panels for each option.

    Args:
        path: PNG file to write.
        rows: Rows of an ablation, as dictionaries; the base is drawn in another colour.
    """
    from matplotlib.figure import Figure  # here: it takes most of a second

    options = list(dict.fromkeys(row["option"] for row in rows))
    size = (3.2 * len(_PANELS), 2.2 * len(options))
    figure = Figure(figsize=size, layout="constrained")
    # One scale for all options, so that what makes no difference looks so.
    grid = figure.subplots(len(options), len(_PANELS), squeeze=False, sharey="col")
    for line, option in zip(grid, options, strict=True):
        chosen = [row for row in rows if row["option"] == option]
        for axes, (heading, figure_of) in zip(line, _PANELS.items(), strict=True):
            for row in chosen:
                value = figure_of(row)
                if value is not None:
                    colour = "C1" if row["is_base"] else "C0"
                    axes.plot([row["value"]], [value], "o", color=colour)
            axes.set(title=heading, xlabel=option)
            axes.ticklabel_format(axis="y", useOffset=False)
    write_figure(path, figure, dpi=90)
