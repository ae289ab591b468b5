"""The demonstration: inversions of videos whose truth is known, and of a real clip."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from stem_kernels.info import provenance

from .clips import shipped_clip
from .compare import Comparison, compare
from .metrics import Interval, mean_interval
from .toy import render, sample_scene
from .video import Video, read_video

NATURAL_CLIP = "carphone_pristine.mp4"  # the embedded model never trained on it
NATURAL_PROMPT = ""  # the embedded model has no words for it
FIRST_SEED = 40_000_000  # of scenes that the embedded model never trained on
FRAMES = 8
WORLD_FPS = 8


@dataclass(frozen=True)
class Demo:
    """What `demo` found.

    Args:
        comparisons: by video: "world-1", ..., and the natural clip's name.
        psnr, ssim: by method ("vae" first), over the world videos.
        json: the file of the figures.
    """

    comparisons: dict[str, Comparison]
    psnr: dict[str, Interval]
    ssim: dict[str, Interval]
    json: Path


def demo(
    pipeline: Any,
    out: Path,
    methods: Sequence[str],
    *,
    options: Mapping[str, Mapping[str, Any]],
    videos: int,
    size: int,
    num_steps: int,
    model: str,
    note: str = "",
) -> Demo:
    """Compare inversions of some world videos and of one natural clip.

    Args:
        pipeline: as for `compare`.
        out: a folder for every video, and demo.json.
        methods, options, num_steps, model, note: as for `compare`.
        videos: how many world videos, at least 1.
        size: H = W of all videos in pixels.

    Raises:
        ValueError: no videos.
    """
    if videos < 1:
        raise ValueError(f"videos is {videos}; it must be at least 1")
    sources: dict[str, tuple[Video, str]] = {}
    for index in range(videos):
        clip = render(sample_scene(FIRST_SEED + index), FRAMES, size)
        sources[f"world-{index + 1}"] = (Video(clip.frames, Fraction(WORLD_FPS)), clip.caption)
    natural = read_video(shipped_clip(NATURAL_CLIP), frames=f"0:{FRAMES}", size=(size, size))
    sources[Path(NATURAL_CLIP).stem] = (natural, NATURAL_PROMPT)
    comparisons = {
        name: compare(
            pipeline,
            video,
            prompt,
            out / name,
            methods,
            options=options,
            num_steps=num_steps,
            model=model,
            note=note,
        )
        for name, (video, prompt) in sources.items()
    }
    psnrs, ssims = (_over_world(comparisons, figure) for figure in ("psnr", "ssim"))
    document = {
        "model": model,
        "note": note,
        "world_videos": videos,
        "frames": FRAMES,
        "pixels": size,
        "steps": num_steps,
        "interval": "mean and half-width of its 95 % interval, world videos",
        "psnr": psnrs,
        "ssim": ssims,
        "provenance": provenance("diffusers"),
    }
    path = out / "demo.json"
    path.write_text(json.dumps(document, indent=2) + "\n")
    return Demo(comparisons, psnrs, ssims, path)


def _over_world(comparisons: Mapping[str, Comparison], figure: str) -> dict[str, Interval]:
    by_method: dict[str, list[float]] = {}
    for name, found in comparisons.items():
        if name.startswith("world-"):
            for row in found.rows:
                by_method.setdefault(row.method, []).append(getattr(row, figure))
    return {method: mean_interval(values) for method, values in by_method.items()}
