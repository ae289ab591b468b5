"""Where a video cuts to another scene."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import pytest
import torch

import stem
from stem import Video, find_cuts
from stem.video.clips import shipped_clip
from stem.video.cuts import LEAST_SCENE
from stem.world import render, sample_scene


def scene(seed: int, frames: int) -> torch.Tensor:
    return render(sample_scene(seed, num_things=1), frames, 64).frames


def video(*parts: torch.Tensor) -> Video:
    return Video(torch.cat(parts), Fraction(8))


def test_every_scene_begins_with_a_cut(tmp_path: Path) -> None:
    clip = video(*(scene(41_000_000 + number, 8 + number) for number in range(8)))
    expected = (8, 17, 27, 38, 50, 63, 77)
    assert find_cuts(clip) == expected
    stem.write_video(tmp_path / "scenes.mp4", clip.frames, clip.fps)
    assert find_cuts(stem.open_video(tmp_path / "scenes.mp4")) == expected


def test_motion_and_noise_are_no_cuts() -> None:
    assert find_cuts(video(scene(41_000_000, 60))) == ()
    noise = torch.randint(0, 256, (20, 64, 64, 3), dtype=torch.uint8)
    assert find_cuts(video(noise)) == ()


def test_cuts_of_a_real_clip() -> None:
    clip = stem.read_video(shipped_clip("bikes.mp4"), size=64)
    assert find_cuts(clip) == (30, 76, 137, 187, 242)  # looked at


@pytest.mark.parametrize("frames", [1, LEAST_SCENE - 1])
def test_a_scene_of_too_few_frames_is_none(frames: int) -> None:
    first, second = scene(41_000_000, 20), scene(41_000_001, 20)
    assert find_cuts(video(first, second[:frames])) == ()
    assert find_cuts(video(first[:frames], second)) == ()
    assert find_cuts(video(first, second)) == (20,)
    assert find_cuts(video(first)) == ()
