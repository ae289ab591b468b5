"""A small video, and inversions of it."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from pipelines import make_pipeline

from stem import Video, invert
from stem.inversion import InversionFolder

STEM = {"num_bases": 8, "num_iters": 2}
DEFAULTS: dict[str, Any] = {
    "method": "stem", "options": STEM, "num_steps": 5, "chunk": None, "progress": False,
}  # fmt: skip
"""Of an inversion here; a chunk of None spares the calls that measure what fits into memory."""


def clip(frames: int = 3) -> Video:
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(frames, 4, 6, 3, generator=generator).permute(0, 3, 1, 2)
    smooth = torch.nn.functional.interpolate(noise, size=(16, 24), mode="bilinear")
    return Video((smooth.permute(0, 2, 3, 1) * 255).to(torch.uint8), Fraction(25))


def inverted(root: Path, **settings: Any) -> InversionFolder:
    settings = {**DEFAULTS, **settings}
    if settings["method"] != "stem":
        settings["options"] = None
    pipeline = settings.pop("pipeline", None) or make_pipeline()
    return invert(pipeline, clip(), "a duck", root, **settings)


def all_latents(folder: InversionFolder) -> torch.Tensor:
    return torch.stack([folder.latents(step) for step in range(len(folder.timesteps))])
