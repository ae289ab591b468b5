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
    FlowMatchEulerDiscreteScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from pipelines import SHAPES, make_pipeline, with_textual_inversion

import stem
from stem.diffusion.checks import check_pipeline
from stem.diffusion.loop import denoise, guided
from stem.diffusion.pipeline import (
    decode_latents,
    encode_frames,
    encode_prompt,
    predict,
    truncated_words,
)
from stem.diffusion.schedule import inverse_scheduler, sampling_scheduler
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


@pytest.mark.parametrize("shape", ["sd1", "sdxl"])
def test_vectors_of_a_textual_inversion_take_the_room_of_words(
    shape: str, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = with_textual_inversion(shape)
    caplog.clear()
    fits = "abc " * 24 + "<cat>"  # 72 letters and 3 vectors
    encode_prompt(pipeline, fits, 16, 16)
    assert not caplog.text
    encode_prompt(pipeline, fits + " swan", 16, 16)
    assert "these words are lost: swan" in caplog.text


def with_parts(**parts: object) -> SimpleNamespace:
    """What `check_pipeline` looks at of a pipeline, with some parts exchanged."""
    pipeline = make_pipeline()
    return SimpleNamespace(**{**pipeline.components, **parts})


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
        (lambda: {"controlnet": object()}, r"is a object \(its controlnet or adapter\), whose"),
        (lambda: {"adapter": object()}, r"is a object \(its controlnet or adapter\), whose"),
        (lambda: {"motion_adapter": object()}, "has a motion_adapter, which the inversion would"),
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


def test_a_vae_s_statistics_of_latents_count_in_both_directions() -> None:
    pipeline = with_parts(vae=copy.deepcopy(make_pipeline().vae))
    pipeline.device = torch.device("cpu")
    frames = torch.randint(256, (3, 16, 16, 3), dtype=torch.uint8)
    plain, decoded = (
        encode_frames(pipeline, frames),
        decode_latents(pipeline, torch.zeros(1, 4, 8, 8)),
    )
    mean, std = [0.5, -1.0, 0.0, 2.0], [1.0, 2.0, 0.5, 4.0]
    pipeline.vae.register_to_config(latents_mean=mean, latents_std=std)
    by_channel = [torch.tensor(value).reshape(1, 4, 1, 1) for value in (mean, std)]
    # As StableDiffusionXLImg2ImgPipeline encodes and StableDiffusionXLPipeline decodes.
    expected = (plain / 5.0 - by_channel[0]) * 5.0 / by_channel[1]
    assert max_error(encode_frames(pipeline, frames), expected) < 1e-5
    zero = -by_channel[0] * 5.0 / by_channel[1]
    assert torch.equal(decode_latents(pipeline, zero.expand(1, 4, 8, 8)), decoded)


def test_a_unet_distilled_with_its_guidance_is_told_that_there_is_none() -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = other_unet(time_cond_proj_dim=33).eval()
    pipeline = StableDiffusionPipeline(**{**make_pipeline().components, "unet": unet})
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    told: list[torch.Tensor] = []
    hook = unet.register_forward_pre_hook(
        lambda _, args, kwargs: told.append(kwargs["timestep_cond"]), with_kwargs=True
    )
    ends = pipeline(
        "a duck", 16, 16, num_inference_steps=2, guidance_scale=1.0, latents=latents,
        output_type="latent",
    ).images  # fmt: skip
    prompt = encode_prompt(pipeline, "a duck", 16, 16)
    scheduler = sampling_scheduler(pipeline, 2)
    found = denoise(latents, scheduler, guided(pipeline, prompt), name="x")
    assert max_error(found, ends) < 1e-5
    # Both directions, every branch, a row each, in the UNet's dtype.
    unet.to(torch.bfloat16)
    prompt = encode_prompt(pipeline, "a duck", 16, 16)
    both = guided(pipeline, prompt, negative=prompt, guidance=3.0)
    denoise(latents, inverse_scheduler(pipeline, 2), both, name="x")
    hook.remove()
    assert [len(each) for each in told] == [1, 1, 1, 1, 2, 2]
    assert told[-1].dtype == torch.bfloat16
    assert all(torch.equal(row.float(), told[0][0]) for each in told for row in each)


def refiner() -> StableDiffusionXLImg2ImgPipeline:
    parts = {**make_pipeline("sdxl").components, "text_encoder": None, "tokenizer": None}
    return StableDiffusionXLImg2ImgPipeline(**parts, requires_aesthetics_score=True)


def kolors() -> SimpleNamespace:
    unet = other_unet(encoder_hid_dim=24, encoder_hid_dim_type="text_proj")
    return with_parts(unet=unet)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (refiner, r"is a refiner \(requires_aesthetics_score\).*use the base model"),
        (kolors, "embeddings of another encoder than CLIP's .*'text_proj', as Kolors.*or XL model"),
        (
            lambda: with_parts(vae=None),
            r"denoises pixels \(as DeepFloyd IF.*use a Stable Diffusion",
        ),
        (lambda: with_parts(text_encoder=None), "has no text_encoder, and an inversion encodes"),
        (lambda: with_parts(tokenizer=None), "has no tokenizer, and an inversion encodes"),
    ],
)
def test_pipelines_of_other_kinds_are_refused_with_what_helps(
    make: Callable[[], object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        check_pipeline(make())
