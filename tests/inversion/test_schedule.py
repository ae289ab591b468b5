"""DDIM's two directions against their formula, and the loop over their steps."""

from __future__ import annotations

import contextlib
import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from pipelines import SCHEDULE, make_pipeline

from stem.attention.waiting import parked
from stem.diffusion.loop import NonFiniteError, denoise, guided
from stem.diffusion.pipeline import encode_prompt, predict
from stem.diffusion.schedule import (
    check_schedule,
    check_steps,
    inverse_scheduler,
    sampling_scheduler,
)
from stem.progress import TOLD_FILE
from stem_kernels.testing import max_error

# diffusers' schedulers give torch's tensors to NumPy's functions.
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")
# What each class can be made with, beside its defaults.
CHANGES: list[dict[str, Any]] = [
    {},
    {"beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_end": 0.012, "steps_offset": 1, "prediction_type": "v_prediction"},
    {"set_alpha_to_one": False},
    {"rescale_betas_zero_snr": True},
    {"trained_betas": np.linspace(1e-4, 0.015, 1000, dtype=np.float32)},
    {"thresholding": True},
    {"final_sigmas_type": "sigma_min", "algorithm_type": "dpmsolver++"},
]
ADMITTED = [
    "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep",
    "DPMSolverMultistep", "DPMSolverMultistepInverse", "DPMSolverSinglestep",
    "EulerAncestralDiscrete", "EulerDiscrete", "HeunDiscrete", "KDPM2AncestralDiscrete",
    "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "RePaint", "SASolver", "TCD", "UnCLIP",
    "UniPCMultistep",
]  # fmt: skip


def schedulers(name: str) -> list[Any]:
    """A class of diffusers, made with every one of the changes that it can be made with."""
    scheduler_class = getattr(diffusers, f"{name}Scheduler")
    known = inspect.signature(scheduler_class).parameters
    made = []
    for change in CHANGES:
        with contextlib.suppress(ValueError):  # UnCLIP's refuses every schedule but its own
            if known.keys() >= change.keys():
                made.append(scheduler_class(**change))
    if name != "UnCLIP":
        made.append(scheduler_class.from_config(diffusers.DDIMScheduler(**SCHEDULE).config))
    return made


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.thinned
@pytest.mark.parametrize("name", ADMITTED)
def test_every_scheduler_s_own_schedule_is_followed(name: str) -> None:
    for given in schedulers(name):
        pipeline, config = SimpleNamespace(scheduler=given), given.config
        check_schedule(given)
        one = config.get("set_alpha_to_one", config.get("final_sigmas_type") != "sigma_min")
        offset, final = config.get("steps_offset", 0), 1.0 if one else given.alphas_cumprod[0]
        for made in (inverse_scheduler(pipeline, 10), sampling_scheduler(pipeline, 10)):
            assert max_error(made.alphas_cumprod, given.alphas_cumprod) < 1e-6, config
            assert made.config.prediction_type == config.get("prediction_type", "epsilon")
            assert sorted(made.timesteps.tolist()) == [offset + 100 * step for step in range(10)]
            ends = [getattr(made, f"{end}_alpha_cumprod", None) for end in ("initial", "final")]
            assert [float(end) for end in ends if end is not None] == [pytest.approx(float(final))]
        if made.config.prediction_type != "epsilon":
            continue
        # Whatever is on in the given one, the sampling undoes an inversion's last step.
        generator = torch.Generator().manual_seed(0)
        before, output = torch.randn(2, 1, 4, 3, 3, generator=generator).mul(3).unbind()
        there, back = inverse_scheduler(pipeline, 10), sampling_scheduler(pipeline, 10)
        after = there.step(output, there.timesteps[-1], before).prev_sample
        undone = back.step(output, back.timesteps[0], after).prev_sample
        assert max_error(undone, before) < 1e-3, config


def test_a_schedule_that_is_not_of_its_betas_is_refused() -> None:
    message = "the alphas_cumprod of its scheduler, a {}, are not those of its betas.*DDIMScheduler"
    shifted = diffusers.CogVideoXDDIMScheduler(snr_shift_scale=3.0)
    with pytest.raises(ValueError, match=message.format("CogVideoXDDIMScheduler")):
        check_schedule(shifted)
    changed = diffusers.EulerDiscreteScheduler()
    changed.alphas_cumprod = changed.alphas_cumprod**2
    with pytest.raises(ValueError, match=message.format("EulerDiscreteScheduler")):
        sampling_scheduler(SimpleNamespace(scheduler=changed), 10)


def test_schedules_that_ddim_cannot_follow_are_refused() -> None:
    with pytest.raises(ValueError, match=r"no variance-preserving.*\(a IPNDMScheduler: no betas"):
        check_schedule(diffusers.IPNDMScheduler())
    continuous = diffusers.EulerDiscreteScheduler(
        timestep_type="continuous", prediction_type="v_prediction", sigma_min=0.1, sigma_max=9.0
    )
    with pytest.raises(ValueError, match="gives the UNet logarithms of sigmas"):
        check_schedule(continuous)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_no_other_scheduler_is_admitted() -> None:
    admitted = []
    for name in dir(diffusers):
        if not name.endswith("Scheduler"):
            continue
        try:
            scheduler = getattr(diffusers, name)()
        except (ImportError, TypeError):  # of an extra, or without defaults
            continue
        with contextlib.suppress(ValueError):
            check_schedule(scheduler)
            admitted.append(name.removesuffix("Scheduler"))
    assert sorted(admitted) == sorted(ADMITTED)


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


def test_steps_that_come_again_are_counted_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told, pipeline = tmp_path / "told", make_pipeline()
    monkeypatch.setenv(TOLD_FILE, str(told))
    seen: list[int] = []

    def prediction(step: int, timestep: torch.Tensor, latents: torch.Tensor) -> torch.Tensor:
        seen.append(step)
        return torch.zeros_like(latents)

    denoise(
        torch.zeros(1, 4, 8, 8),
        sampling_scheduler(pipeline, 5),
        prediction,
        steps=[1, 2, 1, 2, 3],
        done=4,
        name="x",
        progress=True,
    )
    lines = [json.loads(line) for line in told.read_text().splitlines()]
    assert [line["done"] for line in lines] == [4, 5, 6, 7, 8, 9]
    assert {line["total"] for line in lines} == {9}
    assert seen == [1, 2, 1, 2, 3]


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


def test_steps_of_many_frames_go_in_parts_to_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = make_pipeline()
    latents, noise = torch.randn(2, 11, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    for made in (inverse_scheduler, sampling_scheduler):
        scheduler, found = made(pipeline, 4), []
        for at_once in (11, 4):
            monkeypatch.setattr(parked, "FRAMES_AT_ONCE", at_once)
            found.append(denoise(latents, scheduler, lambda *_: noise, name="x"))
        assert torch.equal(*found)
        assert not torch.equal(found[0], latents)
