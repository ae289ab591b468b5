"""One self-attention layer of SD 1.x with its projections, and a whole UNet step."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from stem import InflatedConfig, StemConfig, enable
from stem.attention.handle import make_processors
from stem.attention.processor import RowLayout
from stem.config import AttentionConfig
from stem_kernels import attention_bias, initial_bases
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.testing import eager_basis_attention, eager_em_statistics, eager_soft_em

from .cases import Case, Contender, Outputs, no_common_check
from .operators import NUM_BASES, parity

HEADS = 8
CHECKED = 64
LAYER_KINDS: dict[str, AttentionConfig | None] = {
    "per-frame": None,
    "all-frame": InflatedConfig(),
    "stem": StemConfig(),
    "stem R=5": StemConfig(num_iters=5),
    "stem R=1": StemConfig(num_iters=1),
}


def layer(channels: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """A self-attention with random weights, the same on every machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Attention(channels, heads=HEADS, dim_head=channels // HEADS)
    return module.eval().to(device, dtype)


def set_attention(attention: Attention, config: AttentionConfig | None) -> None:
    """Put a mechanism into one self-attention; None: its own, per frame."""
    if config is not None:
        processors, _ = make_processors({"layer": attention}, config, RowLayout(config.num_frames))
        attention.set_processor(processors["layer"])


def expected(kind: str, attention: Attention, tokens: torch.Tensor) -> torch.Tensor:
    """The output of the first tokens of the first frame, by eager formulas in the tokens' dtype."""
    config = LAYER_KINDS[kind]
    seen = tokens[:1] if config is None else tokens.flatten(0, 1).unsqueeze(0)
    bias = None
    if isinstance(config, StemConfig):
        bases = initial_bases(seen, NUM_BASES).to(tokens.dtype)
        bases = eager_soft_em(seen, bases, num_iters=config.num_iters - 1)
        sums, mass, _ = eager_em_statistics(seen, bases)
        seen = sums / (mass + 1e-4).unsqueeze(-1)
        bias = attention_bias(mass, empty=config.empty, proportional=config.proportional)
    query, key, value = (
        project(rows).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        for project, rows in (
            (attention.to_q, tokens[:1, :CHECKED]),
            (attention.to_k, seen),
            (attention.to_v, seen),
        )
    )
    mixed = eager_basis_attention(query, key, value, bias=bias)
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


def layer_cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """Per-frame and all-frame dense attention against STEM, over resolutions and N."""
    if small:
        shapes = [(2, 8, 64)]
    else:
        shapes = [(32, 64, 320), (32, 32, 640), (32, 16, 1280), (8, 64, 320), (128, 64, 320)]
    for frames, side, channels in shapes:
        yield layer_case(frames, side, channels, device, dtype)


def layer_case(
    frames: int, side: int, channels: int, device: torch.device, dtype: torch.dtype
) -> Case:
    """One layer on tokens [frames, side * side, channels]."""
    attention = layer(channels, device, dtype)
    double = copy.deepcopy(attention).double()
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randn(frames, side * side, channels, generator=generator).to(device, dtype)

    def contender(kind: str) -> Contender:
        def start() -> Callable[[], Outputs]:
            module = copy.deepcopy(attention)
            set_attention(module, LAYER_KINDS[kind])

            def run() -> Outputs:
                with torch.no_grad():
                    return (module(tokens),)

            return run

        def check(answer: Outputs) -> float:
            with torch.no_grad():
                right = parity(
                    (expected(kind, double, tokens.double()),),
                    (expected(kind, attention, tokens),),
                    ROUNDING_ATOL,
                )
            return right((answer[0][:1, :CHECKED],))

        return Contender(start, check)

    return Case(
        f"layer {side}x{side} N={frames}",
        f"N={frames} {side}x{side} C={channels} h={HEADS} K={NUM_BASES}",
        {kind: contender(kind) for kind in LAYER_KINDS},
        no_common_check,
    )


UNET_KINDS: dict[str, AttentionConfig | None] = {
    "per-frame": None,
    "all-frame": InflatedConfig(),
    "stem": StemConfig(),
    "stem R=5": StemConfig(num_iters=5),
    "stem R=1 warm": StemConfig(num_iters=1, init="previous"),
}


def unet_cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[Case]:
    """A denoising step of a whole UNet on N frames, without guidance."""
    unet = make_unet(device, dtype, small=small)
    errors = {kind: unet_error(unet, kind, 8 if small else 32) for kind in UNET_KINDS}
    for frames, side in ((2, 8),) if small else ((32, 64), (32, 96), (32, 128), (120, 64)):
        yield unet_case(unet, frames, side, errors)


def make_unet(device: torch.device, dtype: torch.dtype, *, small: bool) -> UNet2DConditionModel:
    """SD 1.5's UNet, or one of its shape with few channels, with random weights."""
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
    return unet.eval().to(device, dtype)


def unet_case(unet: UNet2DConditionModel, frames: int, side: int, errors: dict[str, float]) -> Case:
    """One step on latents [frames, 4, side, side]; `errors` are what `unet_error` found."""
    inputs = unet_inputs(unet, frames, side)

    def contender(kind: str) -> Contender:
        def check(answer: Outputs) -> float:
            return errors[kind] if bool(answer[0].isfinite().all()) else float("inf")

        return Contender(lambda: stepper(unet, UNET_KINDS[kind], inputs), check)

    # Over all frames of larger videos one step takes several seconds, and no target asks for it.
    kinds = [kind for kind in UNET_KINDS if kind != "all-frame" or side <= 64]
    return Case(
        f"unet {8 * side}x{8 * side} N={frames}",
        f"N={frames} latents {side}x{side}",
        {kind: contender(kind) for kind in kinds},
        no_common_check,
    )


def unet_inputs(
    unet: UNet2DConditionModel, frames: int, side: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents and text states, the same on every machine."""
    generator = torch.Generator().manual_seed(2)
    latents = torch.randn(frames, 4, side, side, generator=generator)
    text = torch.randn(1, 77, unet.config.cross_attention_dim, generator=generator)
    return (
        latents.to(unet.device, unet.dtype),
        text.expand(frames, -1, -1).to(unet.device, unet.dtype),
    )


def stepper(
    unet: UNet2DConditionModel,
    config: AttentionConfig | None,
    inputs: tuple[torch.Tensor, torch.Tensor],
) -> Callable[[], Outputs]:
    """A call that makes one step after the other on a copy of the UNet, with `config` on."""
    own = copy.deepcopy(unet)
    if config is not None:
        enable(own, config)
    timestep = 999

    def step() -> Outputs:
        nonlocal timestep
        timestep = timestep - 1 or 998  # one way, as in a run, or warm starts would begin anew
        with torch.no_grad():
            return (own(inputs[0], timestep, inputs[1], return_dict=False)[0],)

    return step


def unet_error(unet: UNet2DConditionModel, kind: str, side: int) -> float:
    """Of the second step on four frames against float64, over the error allowed.

    Allowed is twice the error of the same attention on the torch backend in the UNet's own dtype.
    """
    config = UNET_KINDS[kind]
    plain = config
    if isinstance(config, StemConfig):
        plain = dataclasses.replace(config, backend="torch")

    def second(model: UNet2DConditionModel, how: AttentionConfig | None) -> torch.Tensor:
        step = stepper(model, how, unet_inputs(model, 4, side))
        step()
        return step()[0]

    exact = second(copy.deepcopy(unet).double(), plain)
    check = parity((exact,), (second(unet, plain),), ROUNDING_ATOL)
    return check((second(unet, config),))
