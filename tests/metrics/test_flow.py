"""Optical flow by name, what of it is occluded, and what is compared along it."""

from __future__ import annotations

import sys

import pytest
import torch
from clips import drifting

from stem.metrics import UnmeasuredError, estimate_flow, occluded, ssim, warped_ssim, world_flow
from stem.world import sample_scene


def test_the_two_directions_of_the_worlds_flow_tell_what_is_occluded() -> None:
    flow = world_flow(sample_scene(40_000_004), 6, 64)
    found = occluded(flow.forward, flow.backward)
    assert flow.occlusion.float().mean() > 0.01
    assert found[flow.occlusion].all()
    # Where it says more than the truth, between the pixels of an object's rim and others.
    assert (found != flow.occlusion).float().mean() < 0.01
    # Out of the picture on one side, and everywhere on the way there and back nowhere near.
    away = torch.tensor([-2.0, 1.0]).expand(1, 8, 8, 2)
    expected = torch.zeros(1, 8, 8, dtype=torch.bool)
    expected[:, :, :2] = True
    expected[:, 7:] = True
    assert torch.equal(occluded(away, -away), expected)
    assert occluded(away, away).all()


def test_warped_ssim_is_that_of_the_frame_before_along_the_flow() -> None:
    video = drifting()
    backward = torch.tensor([2.0, -1.0]).expand(2, 32, 32, 2)
    rows = (torch.arange(32) - 1).clamp(0)
    columns = (torch.arange(32) + 2).clamp(max=31)
    expected = ssim(video[:-1][:, rows][:, :, columns], video[1:])
    assert expected > 0.9
    assert warped_ssim(video, backward) == pytest.approx(expected, abs=1e-5)
    assert warped_ssim(video, torch.zeros_like(backward)) < 0.5
    with pytest.raises(ValueError, match=r"need a backward flow of \[2, 32, 32, 2\]"):
        warped_ssim(video, backward[:1])
    with pytest.raises(ValueError, match="window is 11x11"):
        warped_ssim(video[:, :8], backward[:, :8])


def test_dis_finds_the_motion_and_what_leaves_the_picture() -> None:
    flow = estimate_flow(drifting(), "dis")
    assert flow.name == "OpenCV DIS, preset medium"
    for found, moved in ((flow.forward, (-2, 1)), (flow.backward, (2, -1))):
        assert found.shape == (2, 32, 32, 2)
        assert (found[:, 4:-4, 4:-4] - torch.tensor(moved)).abs().median() < 0.1
    assert flow.occlusion[:, :, 0].all()
    assert not flow.occlusion[:, 4:-4, 4:-4].any()


def test_flows_that_cannot_be_had(no_torchvision: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="flow is 'farneback'; it must be one of dis, raft"):
        estimate_flow(drifting(), "farneback")
    with pytest.raises(UnmeasuredError, match="one frame has no flow"):
        estimate_flow(drifting(1))
    with pytest.raises(UnmeasuredError, match="torchvision is not installed; pip install torch=="):
        estimate_flow(drifting(), "raft")
    with pytest.raises(UnmeasuredError, match="at least 12 pixels a side, not 11"):
        estimate_flow(drifting(side=32)[:, :11], "dis")
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(
        UnmeasuredError, match="OpenCV is not installed; pip install opencv-python-headless"
    ):
        estimate_flow(drifting())
