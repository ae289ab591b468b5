"""AnimateDiff's pipeline with a mechanism on, and what inversions say to other video models."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import AnimateDiffPipeline, MotionAdapter
from pipelines import make_pipeline, make_unet
from video_models import make_model

import stem
from stem import StemConfig
from stem.diffusion.checks import check_pipeline


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.fixture
def animated() -> Any:
    """AnimateDiff on the shared pipeline's parts, which it copies."""
    parts = {**make_pipeline().components, "unet": make_unet()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = MotionAdapter(
            block_out_channels=(32, 64),
            motion_layers_per_block=1,
            motion_num_attention_heads=2,
            motion_norm_num_groups=8,
        )
    names = ("vae", "text_encoder", "tokenizer", "unet", "scheduler")
    pipeline = AnimateDiffPipeline(motion_adapter=adapter, **{name: parts[name] for name in names})
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generated(pipeline: Any, frames: int, **settings: Any) -> torch.Tensor:
    return pipeline(
        "a duck",
        num_frames=frames,
        height=16,
        width=16,
        num_inference_steps=2,
        output_type="latent",
        generator=torch.Generator().manual_seed(0),
        **settings,
    ).frames


@pytest.mark.parametrize("guidance", [7.5, 1.0])
def test_animatediff_s_pipeline(animated: Any, guidance: float) -> None:
    before = generated(animated, 4, guidance_scale=guidance)
    found = []
    for frames in (None, 4):
        with stem.enabled(animated, StemConfig(num_bases=4, num_frames=frames)) as handle:
            assert type(handle.unet).__name__ == "UNetMotionModel"
            found.append(generated(animated, 4, guidance_scale=guidance))
    assert torch.equal(*found)
    assert relative(found[0], before) > 1e-4
    assert torch.equal(generated(animated, 4, guidance_scale=guidance), before)


def test_free_noise_serves_but_not_its_split_inference(animated: Any) -> None:
    animated.enable_free_noise(context_length=2, context_stride=1)
    before = generated(animated, 4)
    config = StemConfig(num_bases=4)
    with stem.enabled(animated, config):
        assert relative(generated(animated, 4), before) > 1e-4
    assert torch.equal(generated(animated, 4), before)
    animated.enable_free_noise_split_inference(temporal_split_size=4)
    with (
        stem.enabled(animated, config),
        pytest.raises(ValueError, match=r"got 4 rows in a call of 8.*split_inference"),
    ):
        generated(animated, 4)


def test_inversions_refuse_other_video_models(animated: Any) -> None:
    check_pipeline(animated)
    video = stem.Video(torch.zeros(2, 16, 16, 3, dtype=torch.uint8), 10)
    unet = make_model("UNet3DConditionModel")
    other = SimpleNamespace(**{**animated.components, "unet": unet})
    message = "unet of SimpleNamespace is a UNet3DConditionModel, not a UNet2DConditionModel or"
    with pytest.raises(TypeError, match=message):
        stem.invert(other, video, "a duck", "nowhere")
    with pytest.raises(TypeError, match="is a UNet3DConditionModel, not a UNet2DConditionModel"):
        check_pipeline(unet)
