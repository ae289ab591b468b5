"""Pictures that ControlNets are shown: edges, depth, and pictures of a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from clips import encode, smooth
from PIL import Image

from stem.control import canny, depth
from stem.video import VideoError, read_pictures


def test_edges_are_opencv_s() -> None:
    frames = torch.zeros(2, 32, 40, 3, dtype=torch.uint8)
    frames[0, 8:24, 10:30] = torch.tensor([200, 60, 0], dtype=torch.uint8)
    found = canny(frames)
    assert found.shape == frames.shape
    assert found.dtype == torch.uint8
    expected = cv2.Canny(frames[0].numpy(), 100, 200)
    assert np.array_equal(found[0].numpy(), np.repeat(expected[:, :, None], 3, 2))
    assert set(found[0].unique().tolist()) == {0, 255}
    assert not found[1].any()
    assert not canny(frames // 16).any()
    assert canny(frames // 16, 10, 20).any()
    with pytest.raises(ValueError, match="thresholds are 200 and 100; they must be"):
        canny(frames, 200, 100)
    with pytest.raises(ValueError, match=r"frames are torch.float32 \[2, 32, 40, 3\]"):
        canny(frames.float())


def test_edges_without_opencv(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(ValueError, match="pip install opencv-python-headless"):
        canny(torch.zeros(1, 8, 8, 3, dtype=torch.uint8))


@pytest.fixture(scope="module")
def depth_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A depth model of random weights, in transformers' format."""
    from transformers import DPTConfig, DPTForDepthEstimation, DPTImageProcessorPil

    config = DPTConfig(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=16,
        image_size=32, patch_size=8, backbone_out_indices=[0, 1, 2, 3],
        neck_hidden_sizes=[8, 8, 8, 8], fusion_hidden_size=8, is_hybrid=False,
        reassemble_factors=[4, 2, 1, 0.5],
    )  # fmt: skip
    folder = tmp_path_factory.mktemp("models") / "depth"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        DPTForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return str(folder)


def test_depth_is_that_of_transformers_scaled_over_the_video(depth_model: str) -> None:
    from transformers import pipeline

    frames = smooth(10, 24, 40)
    found = depth(frames, depth_model)
    assert found.shape == frames.shape
    assert found.dtype == torch.uint8
    assert torch.equal(found[..., 0], found[..., 2])
    assert (int(found.min()), int(found.max())) == (0, 255)
    estimate = pipeline("depth-estimation", model=depth_model)
    expected = torch.stack(
        [estimate(Image.fromarray(frame.numpy()))["predicted_depth"].squeeze() for frame in frames]
    )
    expected = torch.nn.functional.interpolate(
        expected.unsqueeze(1), (24, 40), mode="bicubic", align_corners=False
    ).squeeze(1) if expected.shape[1:] != (24, 40) else expected  # fmt: skip
    low, high = expected.aminmax()
    scaled = (expected - low) / (high - low) * 255
    assert (found[..., 0].float() - scaled).abs().max() <= 1.5


def test_depth_models_that_are_not_there(tmp_path: Path, depth_model: str) -> None:
    frames = smooth(1, 16, 16)
    with pytest.raises(ValueError, match="'nobody/depth' is not on this machine; hf download nob"):
        depth(frames, "nobody/depth")
    with pytest.raises(ValueError, match="no depth model can be loaded from"):
        depth(frames, str(tmp_path))


def test_pictures_of_a_folder(tmp_path: Path) -> None:
    frames = smooth(12, 20, 30)
    for number, frame in enumerate(frames):
        Image.fromarray(frame.numpy()).save(tmp_path / f"frame-{number}.png")
    (tmp_path / "readme.md").write_text("no picture")
    found = read_pictures(tmp_path, multiple_of=1)
    assert torch.equal(found.frames, frames)  # 2 before 10
    chosen = read_pictures(tmp_path, frames="1:8:3", size="8x8")
    assert chosen.frames.shape == (3, 8, 8, 3)
    with pytest.raises(VideoError, match="asked for pictures 3:13, the folder has 12"):
        read_pictures(tmp_path, frames="3:13")
    with pytest.raises(VideoError, match="asked for pictures 20:, the folder has 12"):
        read_pictures(tmp_path, frames="20:")
    Image.fromarray(frames[0, :10].numpy()).save(tmp_path / "frame-12.png")
    with pytest.raises(VideoError, match=r"frame-12.png: is 30x10, and the pictures before it are"):
        read_pictures(tmp_path, multiple_of=1)
    with pytest.raises(VideoError, match="gone: no such folder"):
        read_pictures(tmp_path / "gone")
    (tmp_path / "empty").mkdir()
    with pytest.raises(VideoError, match="empty: holds no picture"):
        read_pictures(tmp_path / "empty")
    encode(tmp_path / "empty" / "film.mkv", frames).rename(tmp_path / "empty" / "film.png")
    with pytest.raises(VideoError, match=r"film\.png: has 12 frames; name a still"):
        read_pictures(tmp_path / "empty")
