"""A pipeline's parts as an inversion uses them: VAE, prompts, and what would be misread."""

from __future__ import annotations

import copy
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import (
    ControlNetModel,
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionControlNetPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from pipelines import SHAPES, make_pipeline

import stem
from stem.diffusion.pipeline import (
    check_pipeline,
    decode_latents,
    encode_frames,
    encode_prompt,
    predict,
    truncated_words,
)
from stem.models import load_pipeline, random_pipeline
from stem.world import caption, sample_scene
from stem_kernels.testing import max_error


def test_latents_are_the_scaled_posterior_mean_in_any_batch() -> None:
    pipeline = make_pipeline()
    frames = torch.randint(256, (11, 16, 24, 3), dtype=torch.uint8)
    latents = encode_frames(pipeline, frames)
    assert latents.dtype == torch.float32
    assert latents.shape == (11, 4, 8, 12)
    with torch.no_grad():
        images = frames.permute(0, 3, 1, 2).float() / 127.5 - 1
        expected = pipeline.vae.encode(images).latent_dist.mode() * 5.0
    assert max_error(latents, expected) < 1e-5
    decoded = decode_latents(pipeline, latents)
    assert decoded.dtype == torch.uint8
    assert decoded.shape == frames.shape
    with pytest.raises(ValueError, match="frames are 24x15; the VAE needs multiples of 2"):
        encode_frames(pipeline, frames[:, :15])


@pytest.mark.parametrize("shape", SHAPES)
def test_conditioning_of_every_shape(shape: str) -> None:
    pipeline = make_pipeline(shape)
    conditioning = encode_prompt(pipeline, "a duck", 16, 24)
    latents = torch.randn(3, 4, 8, 12)
    noise = predict(pipeline, latents, torch.tensor(1), conditioning)
    assert noise.shape == latents.shape
    other = encode_prompt(pipeline, "a swan", 16, 24)
    assert not torch.equal(predict(pipeline, latents, torch.tensor(1), other), noise)
    if shape == "sdxl":
        assert conditioning.added["time_ids"].tolist() == [[16, 24, 0, 0, 16, 24]]


def test_a_half_precision_vae_is_upcast_for_a_while_only() -> None:
    pipeline = random_pipeline(0)
    frames = torch.randint(256, (2, 16, 16, 3), dtype=torch.uint8)
    exact = encode_frames(pipeline, frames)
    pipeline.vae.to(torch.float16)
    pipeline.vae.register_to_config(force_upcast=True)
    latents = encode_frames(pipeline, frames)
    assert float((latents - exact).norm() / exact.norm()) < 0.01  # its weights were rounded
    assert decode_latents(pipeline, latents).shape == frames.shape
    assert pipeline.vae.dtype == torch.float16


def test_frames_of_another_dtype_are_refused() -> None:
    with pytest.raises(ValueError, match=r"must be uint8 \[N, H, W, 3\], not torch.float32"):
        encode_frames(make_pipeline(), torch.rand(2, 16, 16, 3))


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_words_that_the_tokenizer_cuts_off_are_named(
    shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = make_pipeline(shape)
    fits = "abc " * 25  # 75 letters, a token each, between the two marks
    encode_prompt(pipeline, fits, 16, 16)
    assert not caplog.text
    encode_prompt(pipeline, fits + "swan lake", 16, 16)
    lost = caplog.messages[0].rpartition(": ")[2]
    assert lost.replace(" ", "") == "swanlake"
    assert "these words are lost" in caplog.text


def test_words_of_another_language_are_named(caplog: pytest.LogCaptureFixture) -> None:
    pipeline = load_pipeline("embedded")
    encode_prompt(pipeline, caption(sample_scene(1)), 64, 64)
    assert not caplog.text
    encode_prompt(pipeline, "a red tennis player", 64, 64)
    assert "they mean nothing to it: tennis, player" in caplog.text
    lost = truncated_words(pipeline, "tennis " * 40)
    assert set(lost.split()) == {"tennis"}


def with_parts(**parts: object) -> SimpleNamespace:
    """What `check_pipeline` looks at of a pipeline, with some parts exchanged."""
    pipeline = make_pipeline()
    known = {"unet": pipeline.unet, "vae": pipeline.vae, "scheduler": pipeline.scheduler}
    return SimpleNamespace(**{**known, **parts})


def other_unet(**changes: int) -> UNet2DConditionModel:
    return UNet2DConditionModel.from_config(make_pipeline().unet.config, **changes)


def ip_adapter_unet() -> UNet2DConditionModel:
    unet = copy.deepcopy(make_pipeline().unet)
    unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
    return unet


def flow_sigmas() -> UniPCMultistepScheduler:
    return UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (lambda: {"vae": None}, "has no VAE"),
        (lambda: {"controlnet": object()}, "has a controlnet, whose control .* would ignore"),
        (lambda: {"adapter": object()}, "has a adapter, whose control"),
        (lambda: {"unet": other_unet(out_channels=8)}, "gives 8 channels for 4: it predicts its"),
        (lambda: {"unet": other_unet(num_class_embeds=3)}, "wants class labels"),
        (
            lambda: {"unet": other_unet(in_channels=9)},
            "takes 9 channels, and the VAE's latents have 4",
        ),
        (lambda: {"unet": ip_adapter_unet()}, r"call pipeline\.unload_ip_adapter\(\) first"),
        (
            lambda: {"scheduler": FlowMatchEulerDiscreteScheduler()},
            "cannot be inverted: its scheduler is no variance-preserving diffusion schedule",
        ),
        (lambda: {"scheduler": flow_sigmas()}, "or flow matching"),
    ],
)
def test_pipelines_that_an_inversion_would_misread(
    parts: Callable[[], dict[str, object]], message: str, tmp_path: Path
) -> None:
    pipeline = with_parts(**parts())
    with pytest.raises(ValueError, match=message):
        check_pipeline(pipeline)
    video = stem.Video(torch.zeros(1, 16, 16, 3, dtype=torch.uint8), Fraction(8))
    with pytest.raises(ValueError, match=message):
        stem.invert(pipeline, video, "", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_control_net_pipeline_is_refused() -> None:
    pipeline = random_pipeline(0)
    control = StableDiffusionControlNetPipeline(
        **pipeline.components,
        controlnet=ControlNetModel.from_unet(pipeline.unet),
        requires_safety_checker=False,
    )
    with pytest.raises(ValueError, match="StableDiffusionControlNetPipeline, has a controlnet"):
        check_pipeline(control)
