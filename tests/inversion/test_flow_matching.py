"""Inversion of flow-matching transformers: exact to the solver's order, as diffusers samples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from pipelines import make_unet
from transformers_of_video import arguments_of, make_transformer

import stem
from stem.inversion import invert_flow, noise_levels, reconstruct_flow

Case = tuple[Any, torch.Tensor, dict[str, Any]]


@pytest.fixture(scope="module")
def case() -> Case:
    """A transformer, latents, and the other arguments of its call."""
    conditions = arguments_of("wan", videos=2)
    latents = conditions.pop("hidden_states")
    del conditions["timestep"]
    return make_transformer("wan"), latents, conditions


def off(case: Case, **options: Any) -> float:
    """The relative error of latents that went to noise and back."""
    transformer, latents, conditions = case
    noise = invert_flow(transformer, latents, conditions, **options)
    assert not torch.equal(noise, latents)
    back = reconstruct_flow(transformer, noise, conditions, **options)
    return float((back - latents).norm() / latents.norm())


def test_midpoint_is_of_second_order_and_euler_of_first(case: Case) -> None:
    euler, finer_euler = (off(case, num_steps=steps, solver="euler") for steps in (8, 16))
    middle, finer_middle = (off(case, num_steps=steps) for steps in (8, 16))
    assert 1.5 < euler / finer_euler < 3
    assert middle / finer_middle > 3
    assert middle < euler / 5


def test_euler_samples_as_the_scheduler_of_diffusers_does(case: Case) -> None:
    transformer, noise, conditions = case
    scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    levels = noise_levels(6, 3.0)[:0:-1]
    scheduler.set_timesteps(sigmas=levels)
    expected = noise
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            velocity = transformer(expected, timestep.expand(2), **conditions).sample
            expected = scheduler.step(velocity, timestep, expected).prev_sample
    found = reconstruct_flow(transformer, noise, conditions, num_steps=6, solver="euler")
    assert torch.allclose(found, expected, atol=1e-5 * float(expected.abs().max()))


def test_levels_are_those_of_a_shifted_schedule() -> None:
    assert noise_levels(4, 1.0) == [0.0, 0.25, 0.5, 0.75, 1.0]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=5.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])
    assert noise_levels(4, 5.0)[::-1] == pytest.approx(scheduler.sigmas.tolist())


def test_what_is_enabled_stays_on(case: Case) -> None:
    transformer, latents, conditions = case
    own, there_and_back = (
        invert_flow(transformer, latents, conditions, num_steps=2),
        off(case, num_steps=4),
    )
    with stem.enabled(transformer, stem.VideoConfig(tokens_per_base=8)) as handle:
        found = invert_flow(transformer, latents, conditions, num_steps=2)
        assert handle.active
        assert off(case, num_steps=4) < 1.2 * there_and_back
    assert not torch.equal(found, own)
    assert float((found - own).norm() / own.norm()) < 0.1


def test_what_has_no_velocity_is_an_error(case: Case) -> None:
    transformer, latents, conditions = case
    for other, name in ((make_transformer("cogvideox"), "CogVideoX"), (make_unet(), "UNet2D")):
        with pytest.raises(TypeError, match=f"{name}.* predicts no velocity of flow matching"):
            invert_flow(other, latents, conditions)
    with pytest.raises(ValueError, match="solver is 'heun'; it must be one of midpoint, euler"):
        invert_flow(transformer, latents, conditions, solver="heun")
    with pytest.raises(ValueError, match="num_steps is 0"):
        reconstruct_flow(transformer, latents, conditions, num_steps=0)
    with pytest.raises(ValueError, match=r"shift is 0\.5"):
        noise_levels(4, 0.5)
