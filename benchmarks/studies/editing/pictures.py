"""The editing study's plot, and pictures of its best and of its worst edit."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import interpolate

from stem.metrics import mean_interval
from stem.report.pictures import contact_sheet
from stem.world import EDIT_KINDS, world_edit

from ..quality.report import plot_intervals
from .measure import Editor, inversions
from .report import gains, rows_of, values
from .variants import BASELINE, OURS, series_of

SHEET_FRAMES = 8


def draw(results: dict[str, Any], path: Path) -> None:
    """PSNR and Warp-Err by kind of edit, of every variant that was tried on all scenes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(19, 9), layout="constrained")
    grid = figure.subplots(2, len(EDIT_KINDS), squeeze=False)
    labels = {"all": "PSNR, exact answer, dB", "warp": "Warp-Err"}
    for line, (name, label) in zip(grid, labels.items(), strict=True):
        for axes, kind in zip(line, EDIT_KINDS, strict=True):
            rows = rows_of(results, kind)
            tried = {name: len(results["rows"][series.name]) for name, series in rows.items()}
            scenes = max(tried.values(), default=0)
            there = {name: series for name, series in rows.items() if tried[name] == scenes}
            plot_intervals(
                axes,
                {
                    variant: mean_interval(list(values(results, series, name).values()))
                    for variant, series in there.items()
                },
            )
            axes.set(title=f"{kind}, {scenes} scenes", xlabel=f"{label} (95 % interval)")
    figure.savefig(path, dpi=110)


def draw_cases(results: dict[str, Any], out: Path, editor: Editor) -> None:
    """Where fusion gains most over pnp and where it gains least: made again, as pictures.

    Args:
        results: Results of the study.
        out: File of the results; the pictures are <its name>-best.png and <its name>-worst.png.
        editor: Editor of the study.
    """
    found = gains(results)
    if not found:
        return
    for which, case in (
        ("best", max(found, key=found.__getitem__)),
        ("worst", min(found, key=found.__getitem__)),
    ):
        path = out.with_name(f"{out.stem}-{which}.png")
        sheet(results, *case, editor, path)


def sheet(results: dict[str, Any], kind: str, seed: int, editor: Editor, path: Path) -> None:
    """Source, exact answer, pnp, fusion and its masks, frame by frame."""
    edit = world_edit(seed, kind, results["frames"])
    videos = {f"source: {edit.source.caption}": edit.source.frames}
    videos[f"exact answer: {edit.exact.caption}"] = edit.exact.frames
    with tempfile.TemporaryDirectory() as folder:
        inversion = inversions(edit.source, Path(folder))
        for name in (BASELINE, OURS):
            series = series_of(results["frames"], kind, name)
            edited = editor(series, edit, inversion)
            decibels = values(results, series, "all")[str(seed)]
            videos[f"{name} on {series.inversion}: {decibels:.1f} dB"] = edited.frames
            if name == OURS and edited.masks is not None:
                videos["its mask, where it may change the video"] = as_frames(
                    edited.masks, edit.source.frames.shape[1]
                )
    contact_sheet(videos, SHEET_FRAMES, numbered=False).save(path)


def as_frames(masks: torch.Tensor, side: int) -> torch.Tensor:
    """Masks bool [N, h, w] as white on black, uint8 [N, side, side, 3]."""
    grown = interpolate(masks[:, None].float(), size=(side, side), mode="nearest")
    return (255 * grown).to(torch.uint8).permute(0, 2, 3, 1).expand(-1, -1, -1, 3).contiguous()
