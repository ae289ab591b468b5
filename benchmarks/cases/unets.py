"""A denoising step of a whole UNet of SD 1.5's shape: STEM against dense attention."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from diffusers import UNet2DConditionModel

from stem.attention import disable, enable, enabled, plain
from stem.config import AttentionConfig, StemConfig
from stem_kernels.ops.basis_attention import ROUNDING_ATOL

from .case import AnyCase, Call, Case, Contender, Outputs, finite, parity
from .layers import ALL_FRAME, KINDS, LAYER_KINDS, backend_of, of_frames

TIMESTEP = 999
CHECKED_FRAMES = 2


class UNets(NamedTuple):
    """A UNet with random weights, and the same weights in float64."""

    unet: UNet2DConditionModel
    double: UNet2DConditionModel


class StepInputs(NamedTuple):
    """A UNet, latents [frames, 4, side, side] and text states [frames, 77, channels]."""

    unet: UNet2DConditionModel
    latents: torch.Tensor
    text: torch.Tensor


def unet_cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
    """Steps without guidance, over sizes and N; one UNet and one check of a kind serve all.

    diffusers' own attention is not checked against float64, but that its numbers are finite.
    """
    unets = functools.cache(lambda: make_unets(device, dtype, small=small))
    error = functools.cache(lambda kind: unet_error(unets(), KINDS[kind], 8 if small else 32))
    for frames, side in ((2, 8),) if small else ((32, 64), (32, 128), (32, 96), (120, 64)):
        yield unet_case(lambda: unets().unet, error, frames, side, dtype)


def unet_case(
    unet: Callable[[], UNet2DConditionModel],
    error: Callable[[str], float],
    frames: int,
    side: int,
    dtype: torch.dtype,
) -> Case[StepInputs]:
    """One step on latents [frames, 4, side, side].

    Args:
        unet: Function that gives the UNet.
        error: Function that gives what `unet_error` found of a kind of attention.
        frames: Number N of frames.
        side: Height and width of the latents.
        dtype: Type of the UNet.
    """

    def contender(kind: str) -> Contender[StepInputs]:
        config = of_frames(KINDS[kind], frames)

        def start(inputs: StepInputs) -> Call:
            disable(inputs.unet)
            if config is not None:
                enable(inputs.unet, config)
            return lambda: step(inputs)

        def checked(inputs: StepInputs, answer: Outputs) -> float:
            return max(finite(inputs, answer), 0.0 if config is None else error(kind))

        return Contender(start, checked, backend_of(config))

    # Over all frames a step takes seconds: last, and not of larger videos, which no target needs.
    kinds = [kind for kind in LAYER_KINDS if kind != ALL_FRAME]
    kinds += [ALL_FRAME] if side <= 64 else []
    return Case(
        f"unet {8 * side}x{8 * side} N={frames}",
        f"N={frames} latents {side}x{side}",
        dtype,
        lambda: step_inputs(unet(), frames, side),
        {kind: contender(kind) for kind in kinds},
    )


def make_unets(device: torch.device, dtype: torch.dtype, *, small: bool) -> UNets:
    """SD 1.5's UNet, or one of its shape with few channels, the same on every machine."""
    shape: dict[str, Any] = {"cross_attention_dim": 768}
    if small:
        shape = {
            "cross_attention_dim": 64,
            "block_out_channels": (32, 64, 64, 64),
            "norm_num_groups": 8,
        }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DConditionModel(sample_size=64, attention_head_dim=8, **shape)
    unet = unet.eval().to(device, dtype)
    return UNets(unet, copy.deepcopy(unet).double())


def step_inputs(unet: UNet2DConditionModel, frames: int, side: int) -> StepInputs:
    """Latents and text states for a UNet, the same on every machine."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(frames, 4, side, side, generator=generator)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    return StepInputs(
        unet,
        latents.to(unet.device, unet.dtype),
        text.expand(frames, -1, -1).to(unet.device, unet.dtype),
    )


@torch.no_grad()
def step(inputs: StepInputs) -> Outputs:
    """One step with whatever attention is on."""
    return (inputs.unet(inputs.latents, TIMESTEP, inputs.text, return_dict=False)[0],)


def unet_error(unets: UNets, config: AttentionConfig | None, side: int) -> float:
    """The error of a step on CHECKED_FRAMES frames against float64, over the error allowed.

    Allowed is twice the error of the same attention on the torch backend in the UNet's own dtype.
    """
    config = of_frames(config, CHECKED_FRAMES)
    slow = config
    if isinstance(config, StemConfig):
        slow = dataclasses.replace(config, backend="torch")

    def answer(unet: UNet2DConditionModel, how: AttentionConfig | None) -> Outputs:
        inputs = step_inputs(unet, CHECKED_FRAMES, side)
        with plain(unet) if how is None else enabled(unet, how):
            return step(inputs)

    check = parity(answer(unets.double, slow), answer(unets.unet, slow), ROUNDING_ATOL)
    return check(answer(unets.unet, config))


@torch.no_grad()
def sd15_unet(text_channels: int = 768) -> UNet2DConditionModel:
    """A UNet of Stable Diffusion 1.5's shape with random weights, for text states so wide."""
    with torch.device("meta"):
        unet = UNet2DConditionModel(cross_attention_dim=text_channels)
    unet = unet.to_empty(device="cpu").eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in unet.parameters():
        parameter.normal_(std=0.02, generator=generator)
    return unet
