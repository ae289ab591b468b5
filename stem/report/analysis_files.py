"""The files of an analysis of features: a picture, a plot over the timesteps, figures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.nn.functional import interpolate

from stem_kernels.info import provenance

from ..metrics import Flow, similarity_maps
from ..metrics.warp import fetch
from ..video import Video
from .files import write_figure, write_picture, write_with_hashes
from .pictures import labelled_lines, shown_frames
from .projection import ColourProjection

PCA = "one fit over all methods and frames; red, green, blue: the first three components"
_HIDDEN = (40, 60, 160)


@dataclass(frozen=True)
class Shown:
    """What the picture of an analysis is of.

    Args:
        features: Features by method, float32 [N, C, h, w], of one shape.
        flow: Flow of the video.
        timestep: Timestep of the features.
    """

    features: Mapping[str, torch.Tensor]
    flow: Flow
    timestep: int


def analysis_files(folder: Path) -> tuple[Path, Path, Path]:
    """Paths of analysis.json, analysis.png and analysis-plot.png in a folder."""
    return folder / "analysis.json", folder / "analysis.png", folder / "analysis-plot.png"


def write_analysis(
    folder: Path,
    video: Video,
    shown: Shown,
    curves: Mapping[str, Mapping[int, float]],
    settings: Mapping[str, Any],
) -> None:
    """Write the `analysis_files`.

    Args:
        folder: Folder to write to; it is made.
        video: Video that was inverted.
        shown: Features and flow for the picture.
        curves: Mean similarities by method and timestep.
        settings: Settings of the run, for the document; a "note" among them says that the weights
            are random.
    """
    folder.mkdir(parents=True, exist_ok=True)
    figures, sheet, plot = analysis_files(folder)
    suffix = "; random weights" if settings.get("note") else ""
    write_picture(sheet, feature_picture(video.frames, shown, f"input{suffix}"))
    write_curves(plot, curves, f"flow: {shown.flow.name}{suffix}")
    any_maps = next(iter(shown.features.values()))
    document = {
        **settings,
        "video": {
            "name": video.name,
            "frames": video.num_frames,
            "width": video.width,
            "height": video.height,
            "notes": list(video.notes),
        },
        "features": list(any_maps.shape[1:]),
        "pca": PCA,
        "mean": {method: statistics.fmean(curve.values()) for method, curve in curves.items()},
        "similarity": {
            method: {str(timestep): float(f"{value:.7g}") for timestep, value in curve.items()}
            for method, curve in curves.items()
        },
        "provenance": provenance("diffusers", "opencv-python-headless", "torchvision"),
    }
    write_with_hashes(figures, document, (sheet, plot))


def feature_picture(
    frames: torch.Tensor, shown: Shown, label: str = "input", columns: int = 4
) -> Image.Image:
    """Frames, and for each method their features, the former frame's warped, the similarity.

    Features are shown in the colours of one `ColourProjection` over all methods. Similarity is
    gray, black at the least that any method has and white at 1; cells that the former frame does
    not show are blue.

    Args:
        frames: Frames, uint8 [N, H, W, 3], N >= 2.
        shown: Features and flow.
        label: Label of the frames.
        columns: Number of frames to show, at most; the first has no former one.
    """
    first = next(iter(shown.features.values()))
    onward = shown.flow.resized(*first.shape[2:])
    flow = onward.reversed()
    projection = ColourProjection(shown.features.values())
    numbers = [1 + number for number in shown_frames(frames.shape[0] - 1, columns)]
    pairs = [number - 1 for number in numbers]
    similarity = {
        method: similarity_maps(maps.flip(0), flow.forward, flow.occlusion).flip(0)
        for method, maps in shown.features.items()
    }
    hidden = flow.occlusion.flip(0)
    least = min(float(maps[~hidden].min()) for maps in similarity.values())
    size = (frames.shape[1], frames.shape[2])
    lines = {label: frames[numbers].cpu()}
    for method, maps in shown.features.items():
        warped = warped_former(maps, onward)
        mean = float(similarity[method][~hidden].mean())
        lines[f"{method}, t = {shown.timestep}: PCA of all methods together"] = _large(
            projection.colours(maps[numbers]), size
        )
        lines[f"{method}: the former frame's, warped"] = _large(
            projection.colours(warped[pairs]), size
        )
        gray = (similarity[method] - least) / max(1 - least, 1e-6)
        pictures = (gray.clamp(0, 1) * 255).round().to(torch.uint8)
        coloured = pictures[..., None].repeat(1, 1, 1, 3)
        coloured[hidden] = torch.tensor(_HIDDEN, dtype=torch.uint8)
        label = f"{method}: similarity {mean:.4f}; black {least:.3f}, white 1, blue: not seen"
        lines[label] = _large(coloured[pairs], size)
    return labelled_lines(lines, numbers)


def warped_former(maps: torch.Tensor, flow: Flow) -> torch.Tensor:
    """Each frame's features as the flow carries them onto the next frame.

    Args:
        maps: Features [N, C, h, w], float32.
        flow: Flow of the video, of any size.

    Returns:
        float32 [N-1, C, h, w], beside frames 1 ... N-1.
    """
    backward = flow.resized(*maps.shape[2:]).backward
    return fetch(maps[:-1], backward)


def write_curves(path: Path, curves: Mapping[str, Mapping[int, float]], title: str) -> None:
    """Plot similarities over the timesteps, the methods side by side.

    Args:
        path: PNG file to write.
        curves: Mean similarities by method and timestep.
        title: Second line of the title, such as the flow's name.
    """
    from matplotlib.figure import Figure  # here: it takes most of a second

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for method, curve in curves.items():
        mean = statistics.fmean(curve.values())
        axes.plot(list(curve), list(curve.values()), label=f"{method}, mean {mean:.4f}")
    axes.set(
        title=f"features of the last self-attention, former frame's warped\n{title}",
        xlabel="timestep of the inversion",
        ylabel="cosine similarity",
    )
    axes.legend()
    write_figure(path, figure, dpi=110)


def _large(pictures: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Pictures, uint8 [n, h, w, 3], at the frames' height and width, cell by cell."""
    large = interpolate(pictures.permute(0, 3, 1, 2), size=size, mode="nearest")
    return large.permute(0, 2, 3, 1).contiguous()
