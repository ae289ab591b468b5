"""The files of a comparison: figures, a contact sheet, and a video of all methods at once."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from stem_kernels.info import provenance

from ..metrics.fidelity import SSIM_VARIANT, psnr
from ..storage import write_atomically
from ..video import Video, write_video
from .pictures import contact_sheet, side_by_side
from .rows import Measured

if TYPE_CHECKING:  # it takes most of a second
    from matplotlib.figure import Figure


def comparison_files(folder: Path) -> tuple[Path, Path, Path]:
    """Paths of compare.json, compare.png and compare.mp4 in a folder."""
    return folder / "compare.json", folder / "compare.png", folder / "compare.mp4"


def comparison_is_whole(folder: Path) -> bool:
    """Whether the `comparison_files` are there, and are those that were written together."""
    figures, *pictures = comparison_files(folder)
    return are_whole(figures, pictures)


def write_comparison(
    folder: Path, measured: Measured, video: Video, settings: Mapping[str, Any]
) -> None:
    """Write the `comparison_files`.

    Args:
        folder: Folder to write to; it is made.
        measured: Figures and reconstructions.
        video: Video that they are of.
        settings: Settings of the run, for the document; a "note" among them says that the weights
            are random, and so do the pictures then.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Without a word on the pictures, noise from random weights would look like a failure.
    suffix = ", random weights" if settings.get("note") else ""
    videos = {"source": video.frames}
    for method, frames in measured.reconstructions.items():
        videos[shown_name(method) + suffix] = frames
    figures, sheet, clip = comparison_files(folder)
    write_picture(sheet, contact_sheet(videos))
    write_video(clip, (frame[None] for frame in side_by_side(videos)), video.fps)
    write_with_hashes(figures, _document(measured, video, settings), (sheet, clip))


def write_picture(path: Path, picture: Image.Image) -> None:
    """Write a picture as PNG, whole or not at all."""
    data = io.BytesIO()
    picture.save(data, "png")
    write_atomically(path, data.getvalue())


def write_figure(path: Path, figure: Figure, dpi: int) -> None:
    """Write a plot as PNG, whole or not at all."""
    data = io.BytesIO()
    figure.savefig(data, dpi=dpi)
    write_atomically(path, data.getvalue())


def write_with_hashes(path: Path, document: Mapping[str, Any], files: Sequence[Path]) -> None:
    """Write a document of files beside it: the last of them, for it tells that they are whole.

    Args:
        path: File to write.
        document: Document, as JSON types.
        files: Files that it tells of, written before; see `are_whole`.
    """
    write_json(path, {**document, "sha256": _hashes(files)})


def are_whole(path: Path, files: Sequence[Path]) -> bool:
    """Whether a document that `write_with_hashes` wrote is there, and its files as they were."""
    try:
        document = json.loads(path.read_bytes())
        return bool(document["sha256"] == _hashes(files))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return False


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write a document, whole or not at all. JSON has no infinity: inf becomes the text "inf"."""
    text = json.dumps(_finite(document), indent=2, allow_nan=False)
    write_atomically(path, f"{text}\n".encode())


def psnr_by_frame(video: torch.Tensor, original: torch.Tensor) -> list[float]:
    """PSNR in dB of every frame.

    Args:
        video: Frames, uint8 [N, H, W, 3].
        original: Frames to compare with, uint8 [N, H, W, 3].
    """
    pairs = zip(video.split(1), original.split(1), strict=True)
    return [psnr(ours, theirs) for ours, theirs in pairs]


def shown_name(method: str) -> str:
    """A method's name in tables and pictures."""
    return "vae alone" if method == "vae" else method


def _hashes(files: Iterable[Path]) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _document(measured: Measured, video: Video, settings: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **settings,
        "video": {
            "name": video.name,
            "frames": video.frames.shape[0],
            "width": video.frames.shape[2],
            "height": video.frames.shape[1],
            "fps": str(video.fps),
            "notes": list(video.notes),
        },
        "ssim_variant": SSIM_VARIANT,
        "peak_memory": measured.memory,
        "device": measured.device,
        "provenance": provenance("diffusers"),
        "rows": [dataclasses.asdict(row) for row in measured.rows],
        "psnr_by_frame": {
            method: psnr_by_frame(frames, video.frames)
            for method, frames in measured.reconstructions.items()
        },
    }


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
