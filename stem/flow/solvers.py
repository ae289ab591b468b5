"""From latents to noise along the velocity of a flow-matching transformer, and back."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..attention.video import transformer_of, video_family_of
from ..attention.video.state import TIMESTEPS
from ..names import FLOW_METHODS

Velocity = Callable[[torch.Tensor, float], torch.Tensor]
"""(latents, noise level) -> velocity of the latents' shape and dtype."""


def noise_levels(num_steps: int, shift: float = 3.0) -> list[float]:
    r"""Noise levels 0 ... 1 between the steps of a flow-matching sampler.

    $s t / (1 + (s - 1)\, t)$ for even t, as diffusers' flow-matching schedulers shift them.

    Args:
        num_steps: Number of steps, at least 1.
        shift: Factor s >= 1 by which high noise has more steps, that of the model's scheduler.

    Raises:
        ValueError: a value is out of range.
    """
    if type(num_steps) is not int or num_steps < 1:
        raise ValueError(f"num_steps is {num_steps!r}; it must be a whole number of at least 1")
    if not 1 <= shift < float("inf"):
        raise ValueError(f"shift is {shift!r}; it must be at least 1 and finite")
    even = [step / num_steps for step in range(num_steps + 1)]
    return [shift * t / (1 + (shift - 1) * t) for t in even]


def invert_flow(
    transformer: Any,
    latents: torch.Tensor,
    conditions: Mapping[str, Any],
    *,
    num_steps: int = 12,
    shift: float = 3.0,
    solver: str = "midpoint",
) -> torch.Tensor:
    r"""The noise that a flow-matching transformer makes given latents of.

    Latents of noise level t are $x_t = (1 - t)\, x_0 + t\, \epsilon$, and the transformer predicts
    the velocity $\epsilon - x_0$, along which they are followed from 0 to 1. "euler" takes one call
    a step and is as exact as its steps are short; "midpoint" takes two, the second halfway along
    the first, and is exact to second order (RF-Solver's step is the same).

    Args:
        transformer: Transformer of a class that `stem.enable` serves and that predicts a velocity,
            or a pipeline with one: Wan, HunyuanVideo, LTX, not CogVideoX. What is enabled in it
            stays.
        latents: Latents [B, ...] as the transformer takes them, of its dtype.
        conditions: Other arguments of the transformer's call, such as `encoder_hidden_states`.
        num_steps: Number of steps, at least 1.
        shift: Shift of the noise levels, see `noise_levels`.
        solver: Solver, "midpoint" or "euler".

    Returns:
        Noise [B, ...] of the latents' shape and dtype.

    Raises:
        TypeError: the transformer is of another class.
        ValueError: a value is out of range.

    Source: the midpoint rule; arXiv 2411.04746 (RF-Solver).
    """
    levels = noise_levels(num_steps, shift)
    return _followed(transformer, latents, conditions, levels, solver)


def reconstruct_flow(
    transformer: Any,
    noise: torch.Tensor,
    conditions: Mapping[str, Any],
    *,
    num_steps: int = 12,
    shift: float = 3.0,
    solver: str = "midpoint",
) -> torch.Tensor:
    """The latents that a flow-matching transformer makes of noise: `invert_flow` the other way.

    With other conditions it is sampling; with "euler" that of diffusers' flow-matching scheduler.

    Args:
        transformer: Transformer or pipeline, as for `invert_flow`.
        noise: Noise [B, ...], as the transformer takes it.
        conditions: Other arguments of the transformer's call.
        num_steps: Number of steps, at least 1.
        shift: Shift of the noise levels.
        solver: Solver, "midpoint" or "euler".

    Returns:
        Latents [B, ...] of the noise's shape and dtype.

    Raises:
        TypeError, ValueError: as `invert_flow`.
    """
    levels = noise_levels(num_steps, shift)[::-1]
    return _followed(transformer, noise, conditions, levels, solver)


def moved(
    velocity: Velocity, sample: torch.Tensor, level: float, following: float, solver: str
) -> torch.Tensor:
    """A sample after one step along the velocity.

    Args:
        velocity: Velocity at a sample and a noise level.
        sample: Sample at `level`.
        level: Noise level before the step.
        following: Noise level after it.
        solver: Solver, "midpoint" or "euler".
    """
    step = following - level
    along = velocity(sample, level)
    if solver == "midpoint":
        along = velocity(sample + step / 2 * along, level + step / 2)
    return sample + step * along


@torch.no_grad()
def velocity_at(
    transformer: Any,
    sample: torch.Tensor,
    level: float,
    conditions: Mapping[str, Any],
    dtype: torch.dtype,
) -> torch.Tensor:
    """The velocity that a transformer predicts, in the sample's dtype.

    Args:
        transformer: Transformer.
        sample: Sample [B, ...], as the transformer takes it.
        level: Noise level, 1 for pure noise.
        conditions: Other arguments of the transformer's call.
        dtype: Dtype that the transformer is given the sample in.
    """
    timestep = torch.full((sample.shape[0],), TIMESTEPS * level, device=sample.device)
    (predicted,) = transformer(
        hidden_states=sample.to(dtype), timestep=timestep, return_dict=False, **conditions
    )
    return predicted.to(sample.dtype)


def check_solver(solver: str) -> None:
    """Raise ValueError where a solver is none of `FLOW_METHODS`."""
    if solver not in FLOW_METHODS:
        raise ValueError(f"solver is {solver!r}; it must be one of {', '.join(FLOW_METHODS)}")


def _followed(
    target: Any,
    sample: torch.Tensor,
    conditions: Mapping[str, Any],
    levels: list[float],
    solver: str,
) -> torch.Tensor:
    """The sample at the last of the noise levels; sums are float32, or float64 for float64."""
    transformer = _flow_transformer(target)
    check_solver(solver)
    dtype = sample.dtype

    def velocity(at: torch.Tensor, level: float) -> torch.Tensor:
        return velocity_at(transformer, at, level, conditions, dtype)

    found = sample.detach().to(torch.promote_types(dtype, torch.float32))
    for level, following in itertools.pairwise(levels):
        found = moved(velocity, found, level, following, solver)
    return found.to(dtype)


def _flow_transformer(target: Any) -> torch.nn.Module:
    found = transformer_of(target)
    family = None if found is None else video_family_of(found)
    if found is None or family is None or not family.flow:
        raise TypeError(
            f"{type(target if found is None else found).__name__} predicts no velocity of flow "
            "matching that is known here; pass a WanTransformer3DModel, a "
            "HunyuanVideoTransformer3DModel or an LTXVideoTransformer3DModel"
        )
    module = getattr(target, "transformer", target)
    return module if isinstance(module, torch.nn.Module) else found
