"""Schedules against their formula, and a pipeline's parts as an inversion uses them."""

from __future__ import annotations

import contextlib
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
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from peft import LoraConfig
from pipelines import SHAPES, make_pipeline

import stem
from stem.diffusion import fingerprint as hashes
from stem.diffusion.fingerprint import fingerprint
from stem.diffusion.loop import NonFiniteError, denoise, guided
from stem.diffusion.pipeline import (
    check_pipeline,
    decode_latents,
    encode_frames,
    encode_prompt,
    predict,
    truncated_words,
    vae_factor,
)
from stem.diffusion.schedule import check_steps, inverse_scheduler, sampling_scheduler
from stem.models import (
    ModelError,
    known_schedule,
    known_vae_factor,
    load_pipeline,
    random_pipeline,
)
from stem.toy import caption, sample_scene
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
    with pytest.raises(ValueError, match=r"1000 steps would begin .* past .* 999; take .*500$"):
        inverse_scheduler(make_pipeline(), 1000)


@pytest.mark.parametrize("steps", [-3, 0, 30, 333, 999, 1000, 1001, 10**6])
@pytest.mark.parametrize("offset", [0, 1])
def test_steps_that_are_named_can_be_used(steps: int, offset: int) -> None:
    with contextlib.suppress(ValueError):
        check_steps(steps, 1000, offset)  # 1000 can be used without an offset
        return
    with pytest.raises(ValueError, match="; take ") as caught:
        check_steps(steps, 1000, offset)
    named = str(caught.value).rpartition("take ")[2].split(", ")
    assert len(named) == 3
    for other in map(int, named):
        check_steps(other, 1000, offset)


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


def test_a_fingerprint_sees_one_row_of_a_text_embedding() -> None:
    pipeline = random_pipeline(0)
    embedding = pipeline.text_encoder.get_input_embeddings().weight
    seen = [fingerprint(pipeline)["weights_sha256"]]
    for row in (3, 400):
        with torch.no_grad():
            embedding[row] += 1e-3
        seen.append(fingerprint(pipeline)["weights_sha256"])
    embedding.data = embedding.data.clone()
    embedding.data[7, 1] += 1e-3
    seen.append(fingerprint(pipeline)["weights_sha256"])
    assert len(set(seen)) == 4
    assert fingerprint(pipeline)["weights_sha256"] == seen[-1]
    # In a tensor of many rows, through .data, which no counter of torch sees.
    pipeline.text_encoder.resize_token_embeddings(20_000)
    embedding = pipeline.text_encoder.get_input_embeddings().weight
    before = fingerprint(pipeline)
    embedding.data[12_345, 6] += 1e-3
    assert fingerprint(pipeline) != before


def test_weights_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = random_pipeline(0)
    first = fingerprint(pipeline)
    read: list[torch.Tensor] = []
    monkeypatch.setattr(hashes, "_tensor_hash", lambda tensor: str(read.append(tensor)))
    assert fingerprint(pipeline) == first
    assert not read
    with torch.no_grad():
        pipeline.vae.quant_conv.bias += 1
    fingerprint(pipeline)
    assert len(read) == len(pipeline.vae.state_dict())


def test_a_fingerprint_needs_weights() -> None:
    pipeline = random_pipeline(0)
    pipeline.text_encoder.to("meta")
    with pytest.raises(ValueError, match="text_encoder's weights are on the meta device"):
        fingerprint(pipeline)


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


def test_a_fingerprint_sees_configurations_and_tokenizers() -> None:
    pipeline = random_pipeline(0)
    seen = [fingerprint(pipeline)["config_sha256"]]
    pipeline.tokenizer("a much longer prompt", truncation=True, padding="max_length")
    assert fingerprint(pipeline)["config_sha256"] == seen[0]
    pipeline.text_encoder.config.hidden_act = "relu"
    seen.append(fingerprint(pipeline)["config_sha256"])
    vocabulary = dict(pipeline.tokenizer.get_vocab())
    vocabulary["a</w>"], vocabulary["b</w>"] = vocabulary["b</w>"], vocabulary["a</w>"]
    pipeline.tokenizer = type(pipeline.tokenizer)(vocab=vocabulary, merges=[], model_max_length=77)
    seen.append(fingerprint(pipeline)["config_sha256"])
    assert len(set(seen)) == 3


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


def test_loading_with_a_device_and_a_dtype(tmp_path: Path) -> None:
    assert load_pipeline("random", dtype="bfloat16").unet.dtype == torch.bfloat16
    assert load_pipeline("random", dtype=torch.float16, device="cpu").vae.dtype == torch.float16
    with pytest.raises(ValueError, match="dtype is 'half'; it must be one of float32, float16"):
        load_pipeline("random", dtype="half")
    with pytest.raises(ValueError, match="device is 'gpu'; write cpu, cuda"):
        load_pipeline("random", device="gpu")
    with pytest.raises(ValueError, match=r"device is 'cuda:99', and torch .* sees \d+ CUDA"):
        load_pipeline("random", device="cuda:99")
    random_pipeline(0).save_pretrained(tmp_path)
    for model in ("random", "random:3", "embedded", str(tmp_path)):
        pipeline = load_pipeline(model)
        assert known_vae_factor(model) == vae_factor(pipeline)
        schedule = known_schedule(model)
        assert schedule is not None
        assert schedule["num_train_timesteps"] == 1000
        assert schedule["steps_offset"] == pipeline.scheduler.config.steps_offset
    assert known_vae_factor("some/hub-id") is None
    assert known_schedule("some/hub-id") is None


def test_the_loop_goes_both_ways_with_guidance_and_callbacks() -> None:
    pipeline = make_pipeline()
    prompts = [encode_prompt(pipeline, text, 16, 24) for text in ("a duck", "")]
    latents = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    scheduler = sampling_scheduler(pipeline, 5)
    predicted = [predict(pipeline, latents, scheduler.timesteps[1], prompt) for prompt in prompts]
    expected = predicted[1] + 3.0 * (predicted[0] - predicted[1])
    prediction = guided(pipeline, prompts[0], negative=prompts[1], guidance=3.0)
    assert max_error(prediction(1, scheduler.timesteps[1], latents), expected) < 1e-4
    with pytest.raises(ValueError, match=r"guidance is 3\.0; it needs the conditioning"):
        guided(pipeline, prompts[0], guidance=3.0)
    seen: list[tuple[str, int]] = []

    def after(step: int, latents: torch.Tensor) -> torch.Tensor | None:
        seen.append(("after", step))
        return torch.zeros_like(latents) if step == 3 else None

    arguments = {"before_step": lambda step: seen.append(("before", step)), "after_step": after}
    for make in (inverse_scheduler, sampling_scheduler):
        seen.clear()
        end = denoise(
            latents, make(pipeline, 5), prediction, steps=range(1, 4), name="x", **arguments
        )
        assert not end.any()
        assert seen == [(when, step) for step in (1, 2, 3) for when in ("before", "after")]


def test_latents_that_are_not_finite_stop_the_run() -> None:
    pipeline = make_pipeline()

    def prediction(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        noise = torch.zeros_like(latents)
        noise[2] = float("inf") if step == 1 else 0.0
        return noise

    kept: list[int] = []
    with pytest.raises(NonFiniteError, match=r"x, step 2 of 5 \(timestep 601\): .* frame 2 are"):
        denoise(
            torch.zeros(4, 4, 8, 8),
            sampling_scheduler(pipeline, 5),
            prediction,
            after_step=lambda step, latents: kept.append(step),
            name="x",
        )
    assert kept == [0]
