"""Schedules against their formula, and a pipeline's parts as an inversion uses them."""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig
from pipelines import SHAPES, make_pipeline

from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.pipeline import (
    decode_latents,
    encode_frames,
    encode_prompt,
    predict,
    vae_factor,
)
from stem.diffusion.schedule import inverse_scheduler, sampling_scheduler
from stem.models import ModelError, load_pipeline, random_pipeline
from stem_kernels.testing import max_error


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 10, 50])
def test_schedulers_follow_the_formula(prediction_type: str, num_steps: int) -> None:
    pipeline = make_pipeline(prediction_type=prediction_type)
    alphas = pipeline.scheduler.alphas_cumprod.double()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, 3, 3, generator=generator)
    outputs = [torch.randn(x.shape, generator=generator) for _ in range(num_steps)]
    scheduler = inverse_scheduler(pipeline, num_steps)
    timesteps = [int(t) for t in scheduler.timesteps]
    assert timesteps == [1 + i * (1000 // num_steps) for i in range(num_steps)]

    def noise_and_x0(
        x: torch.Tensor, output: torch.Tensor, a: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if prediction_type == "v_prediction":
            return a.sqrt() * output + (1 - a).sqrt() * x, a.sqrt() * x - (1 - a).sqrt() * output
        return output, (x - (1 - a).sqrt() * output) / a.sqrt()

    final = alphas[0]  # SD's set_alpha_to_one is False
    found, expected = x, x.double()
    for i, t in enumerate(timesteps):
        noise, x0 = noise_and_x0(expected, outputs[i], alphas[timesteps[i - 1]] if i else final)
        expected = alphas[t].sqrt() * x0 + (1 - alphas[t]).sqrt() * noise
        found = scheduler.step(outputs[i], scheduler.timesteps[i], found).prev_sample
    assert max_error(found, expected) < 1e-5

    sampler = sampling_scheduler(pipeline, num_steps)
    assert [int(t) for t in sampler.timesteps] == timesteps[::-1]
    for i, t in enumerate(timesteps[::-1]):
        before = final if i == num_steps - 1 else alphas[timesteps[num_steps - 2 - i]]
        noise, x0 = noise_and_x0(expected, outputs[i], alphas[t])
        expected = before.sqrt() * x0 + (1 - before).sqrt() * noise
        found = sampler.step(outputs[i], sampler.timesteps[i], found).prev_sample
    assert max_error(found, expected) < 1e-4


def test_steps_that_do_not_divide_name_others() -> None:
    with pytest.raises(ValueError, match=r"30 steps do not divide the 1000 training.*25.*40"):
        inverse_scheduler(make_pipeline(), 30)
    with pytest.raises(ValueError, match="0 steps do not divide"):
        sampling_scheduler(make_pipeline(), 0)
    # SD's steps_offset of 1 would make the last of 1000 timesteps 1000.
    with pytest.raises(ValueError, match="noisiest timestep would be 1000, and the schedule ends"):
        inverse_scheduler(make_pipeline(), 1000)


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


def test_the_random_pipeline_is_stable_diffusion_shaped_and_seeded() -> None:
    state = torch.random.get_rng_state()
    first, again, other = random_pipeline(0), random_pipeline(0), random_pipeline(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert isinstance(first, StableDiffusionPipeline)
    assert vae_factor(first) == 8
    assert fingerprint(first) == fingerprint(again)
    assert fingerprint(first) != fingerprint(other)
    ids = first.tokenizer("a duck").input_ids
    assert ids[0] == 512
    assert ids[-1] == 513
    assert first.tokenizer.decode(ids[1:-1]).replace(" ", "") == "aduck"


def test_loading_from_a_folder(tmp_path) -> None:  # type: ignore[no-untyped-def]
    original = random_pipeline(3)
    original.save_pretrained(tmp_path / "model")
    assert fingerprint(load_pipeline("random:3")) == fingerprint(original)
    loaded = load_pipeline(str(tmp_path / "model"))
    assert fingerprint(loaded) == fingerprint(original)
    assert loaded.tokenizer("a duck").input_ids == original.tokenizer("a duck").input_ids


def test_models_that_cannot_be_used(tmp_path, monkeypatch) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"can be loaded from the folder.*model_index\.json"):
        load_pipeline(str(tmp_path))
    with pytest.raises(ModelError, match="can be loaded from the hub id 'no/such-model'"):
        load_pipeline("no/such-model")


def test_a_fingerprint_sees_configuration_and_weights() -> None:
    pipeline = random_pipeline(0)
    before = fingerprint(pipeline)
    unet: UNet2DConditionModel = pipeline.unet
    with torch.no_grad():
        unet.conv_in.bias += 1
    changed = fingerprint(pipeline)
    assert changed["config_sha256"] == before["config_sha256"]
    assert changed["weights_sha256"] != before["weights_sha256"]
    pipeline.vae.register_to_config(scaling_factor=1.0)
    assert fingerprint(pipeline)["config_sha256"] != before["config_sha256"]


@pytest.mark.parametrize("component", ["vae", "text_encoder"])
def test_a_fingerprint_sees_every_component(component: str) -> None:
    pipeline = random_pipeline(0)
    before = fingerprint(pipeline)
    with torch.no_grad():
        for parameter in getattr(pipeline, component).parameters():
            parameter.mul_(1.3)
    assert fingerprint(pipeline) != before


def test_a_fingerprint_sees_what_lora_and_freeu_do() -> None:
    pipeline = random_pipeline(0)
    seen = [fingerprint(pipeline)]
    pipeline.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="style")
    seen.append(fingerprint(pipeline))
    pipeline.unet.set_adapters(["style"], [0.3])
    seen.append(fingerprint(pipeline))
    pipeline.unet.disable_adapters()
    seen.append(fingerprint(pipeline))
    pipeline.enable_freeu(0.9, 0.2, 1.5, 1.6)
    seen.append(fingerprint(pipeline))
    assert len({one["weights_sha256"] for one in seen}) == len(seen)


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
