"""Scenes of one video: each as a video by itself, in attention and on disk."""

from __future__ import annotations

import dataclasses
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from inversions import clip
from pipelines import call, make_pipeline, make_unet, unet_inputs

import stem
from stem import InflatedConfig, PerFrameConfig, SparseCausalConfig, StemConfig, Video, invert
from stem.inversion import InversionFolder, reconstruct_latents

FRAMES, CUTS = 8, (3, 5)
STEM = {"num_bases": 8, "num_iters": 2}


def alone(unet: Any, config: Any, start: int, end: int) -> torch.Tensor:
    """The output of a scene's rows, as a video by itself."""
    (sample, timestep, text), keywords = unet_inputs(rows=2 * FRAMES)
    rows = [branch * FRAMES + frame for branch in (0, 1) for frame in range(start, end)]
    config = dataclasses.replace(config, num_frames=end - start, cuts=())
    with stem.enabled(unet, config), torch.no_grad():
        out: torch.Tensor = unet(sample[rows], timestep, text[rows], **keywords)[0]
    return out.unflatten(0, (2, end - start))


@pytest.mark.parametrize(
    "config",
    [
        StemConfig(num_bases=8, temperature=0.1, fit_frames=2, num_frames=FRAMES, cuts=CUTS),
        StemConfig.released(num_bases=8, temperature=0.1, num_frames=FRAMES, cuts=CUTS),
        SparseCausalConfig(frames=("mid", "last"), num_frames=FRAMES, cuts=CUTS),
        InflatedConfig(num_frames=FRAMES, cuts=CUTS),
        PerFrameConfig(num_frames=FRAMES, cuts=CUTS),
    ],
    ids=lambda config: type(config).__name__,
)
@pytest.mark.parametrize("chunk", [None, 2])
def test_a_scene_is_a_video_by_itself(config: Any, chunk: int | None) -> None:
    unet = make_unet()
    with stem.enabled(unet, dataclasses.replace(config, chunk=chunk)):
        found = call(unet, rows=2 * FRAMES).unflatten(0, (2, FRAMES))
    for start, end in ((0, 3), (3, 5), (5, 8)):
        expected = alone(unet, config, start, end)
        torch.testing.assert_close(found[:, start:end], expected, rtol=0, atol=1e-5)
    if not isinstance(config, PerFrameConfig):
        with stem.enabled(unet, dataclasses.replace(config, cuts=())):
            whole = call(unet, rows=2 * FRAMES).unflatten(0, (2, FRAMES))
        assert (found - whole).abs().max() > 1e-4


def test_memory_that_runs_out_halves_the_longest_scene(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unet = make_unet()
    own = type(unet).forward

    def forward(self: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 2 * 2:
            raise torch.OutOfMemoryError("too large")
        return own(self, sample, *args, **kwargs)

    monkeypatch.setattr(type(unet), "forward", forward)
    with stem.enabled(unet, StemConfig(num_bases=8, num_frames=FRAMES, cuts=CUTS)) as handle:
        call(unet, rows=2 * FRAMES)
        assert handle.chunk == 2
    assert "a chunk of 3 frames; going on in chunks of 2" in caplog.text


@pytest.mark.parametrize(
    ("cuts", "frames", "message"),
    [
        ((0,), 8, "from 1 to the last frame's"),
        ((8,), 8, "from 1 to the last frame's"),
        ((5, 3), 8, "ascending"),
        ((3, 3), 8, "ascending"),
        ((3,), None, "needs num_frames"),
        ("3", 8, "numbers of frames"),
        ((2.5,), 8, "numbers of frames"),
    ],
)
def test_cuts_that_do_not_fit_are_named(cuts: Any, frames: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        InflatedConfig(num_frames=frames, cuts=cuts)
    assert "cuts is" in str(caught.value)


def inverted(root: Path, video: Video, **settings: Any) -> InversionFolder:
    return invert(
        make_pipeline(), video, "a duck", root, num_steps=2, chunk=None, progress=False, **settings
    )


@pytest.mark.parametrize(
    ("method", "options"), [("stem", {**STEM, "fit_frames": 2}), ("inflated", {})]
)
def test_an_inversion_of_scenes_is_theirs_joined(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    frames = clip(7).frames
    found = inverted(
        tmp_path, Video(frames, Fraction(25)), method=method, options=options, cuts=(4,)
    )
    assert found.settings["attention"]["cuts"] == [4]
    opened = InversionFolder.open(found.path)
    back = reconstruct_latents(make_pipeline(), opened, progress=False)
    for start, end in ((0, 4), (4, 7)):
        part = Video(frames[start:end], Fraction(25))
        own = inverted(tmp_path, part, method=method, options=options)
        torch.testing.assert_close(found.latents(-1)[start:end], own.latents(-1), rtol=0, atol=1e-4)
        expected = reconstruct_latents(make_pipeline(), own, progress=False)
        torch.testing.assert_close(back[start:end], expected, rtol=0, atol=1e-3)


def test_bases_of_one_scene_are_not_kept_for_several(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_bases keeps the bases of one scene, and cuts is"):
        inverted(tmp_path, clip(7), options=STEM, cuts=(4,), keep_bases=True)
    assert not list(tmp_path.iterdir())
