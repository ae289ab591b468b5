"""One self-attention layer of SD 1.x with its projections: STEM against dense attention."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from diffusers.models.attention_processor import Attention

from stem.attention import Hooks
from stem.attention.handle import make_processors
from stem.attention.layers.rows import RowLayout
from stem.config import AttentionConfig, InflatedConfig, SparseCausalConfig, StemConfig
from stem_kernels import attention_bias, initial_bases
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.ops.calibration import MOMENTS_STEP, MOMENTS_TOKENS
from stem_kernels.ops.soft_em import EARLY_STRIDE
from stem_kernels.shared.spread import spread_tokens
from stem_kernels.testing import (
    eager_basis_attention,
    eager_em_statistics,
    eager_moments,
    eager_soft_em,
)

from .case import AnyCase, Call, Case, Contender, Outputs, parity
from .em import NUM_BASES

HEADS = 8
CHECKED = 64
ALL_FRAME = "all-frame"
KINDS: dict[str, AttentionConfig | None] = {
    "per-frame": None,
    "sparse-causal": SparseCausalConfig(),
    ALL_FRAME: InflatedConfig(),
    "stem": StemConfig(),
    "stem R=5": StemConfig(num_iters=5),
    "stem R=1": StemConfig(num_iters=1),
}
"""Attentions by the names of their contenders."""
LAYER_KINDS = ("per-frame", ALL_FRAME, "stem", "stem R=5", "stem R=1")


class LayerInputs(NamedTuple):
    """A self-attention, and tokens [frames, side * side, channels]."""

    attention: Attention
    tokens: torch.Tensor


def layer_cases(device: torch.device, dtype: torch.dtype, *, small: bool) -> Iterator[AnyCase]:
    """Per-frame and all-frame dense attention against STEM, over resolutions and N."""
    if small:
        shapes = [(2, 8, 64)]
    else:
        shapes = [(32, 64, 320), (32, 32, 640), (32, 16, 1280), (8, 64, 320), (128, 64, 320)]
    for frames, side, channels in shapes:
        yield layer_case(frames, side, channels, device, dtype)


def layer_case(
    frames: int,
    side: int,
    channels: int,
    device: torch.device,
    dtype: torch.dtype,
    kinds: Sequence[str] = LAYER_KINDS,
) -> Case[LayerInputs]:
    """One layer on tokens [frames, side * side, channels], with the attentions `kinds`."""

    def inputs() -> LayerInputs:
        generator = torch.Generator(device).manual_seed(1)
        tokens = torch.randn(
            frames, side * side, channels, generator=generator, device=device, dtype=dtype
        )
        return LayerInputs(layer(channels, device, dtype), tokens)

    def contender(kind: str) -> Contender[LayerInputs]:
        config = of_frames(KINDS[kind], frames)

        def start(inputs: LayerInputs) -> Call:
            module = copy.deepcopy(inputs.attention)
            set_attention(module, config)

            @torch.no_grad()
            def run() -> Outputs:
                return (module(inputs.tokens),)

            return run

        @torch.no_grad()
        def error(inputs: LayerInputs, answer: Outputs) -> float:
            double = copy.deepcopy(inputs.attention).double()
            right = parity(
                (expected(config, double, inputs.tokens.double()),),
                (expected(config, *inputs),),
                ROUNDING_ATOL,
                largest_logit(config, inputs.tokens),
            )
            return right((answer[0][:1, :CHECKED],))

        return Contender(start, error, backend_of(config))

    return Case(
        f"layer {side}x{side} N={frames}",
        f"N={frames} {side}x{side} C={channels} h={HEADS} K={NUM_BASES}",
        dtype,
        inputs,
        {kind: contender(kind) for kind in kinds},
    )


def layer(channels: int, device: torch.device, dtype: torch.dtype) -> Attention:
    """A self-attention with random weights, the same on every machine."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = Attention(channels, heads=HEADS, dim_head=channels // HEADS)
    return module.eval().to(device, dtype)


def of_frames(config: AttentionConfig | None, frames: int) -> AttentionConfig | None:
    """A configuration for a batch of so many frames: one video, if it does not say otherwise."""
    if config is None or config.num_frames is not None:
        return config
    return dataclasses.replace(config, num_frames=frames)


def largest_logit(config: AttentionConfig | None, tokens: torch.Tensor) -> float:
    """The largest |S| of EM on tokens, whose rounding moves all that follows; 0 without EM."""
    if not isinstance(config, StemConfig):
        return 0.0
    return float(tokens.double().norm(dim=-1).max()) / config.temperature


def backend_of(config: AttentionConfig | None) -> str:
    """The backend that a configuration names."""
    return config.backend if isinstance(config, StemConfig) else ""


def set_attention(attention: Attention, config: AttentionConfig | None) -> None:
    """Put a mechanism into one self-attention; None: its own, per frame."""
    if config is not None:
        processors, _ = make_processors(
            {"layer": attention}, config, RowLayout(config.num_frames), Hooks()
        )
        attention.set_processor(processors["layer"])


def processor_call(
    config: AttentionConfig, attention: Attention, tokens: torch.Tensor, timestep: torch.Tensor
) -> Callable[[], torch.Tensor]:
    """A call of a mechanism, whatever the layer's width, on tokens [frames, S, C] of a timestep."""
    made, state = make_processors(
        {"layer": attention}, config, RowLayout(config.num_frames), Hooks(), everywhere=True
    )
    if state is not None:
        state.begin(tokens, timestep)
    return partial(made["layer"], attention, tokens)


def expected(
    config: AttentionConfig | None, attention: Attention, tokens: torch.Tensor
) -> torch.Tensor:
    """The output of the first tokens of the first frame, by eager formulas in the tokens' dtype.

    The previous and the first frame, which sparse-causal attention sees, are there that frame too.
    """
    bias = correction = None
    if config is None or isinstance(config, SparseCausalConfig):
        seen = tokens[:1]
    else:
        seen = tokens.flatten(0, 1).unsqueeze(0)
    asking = _projected(attention.to_q, tokens[:1, :CHECKED])
    if isinstance(config, StemConfig):
        total = seen.shape[1]
        seen = seen[:, spread_tokens(total, config.sampled(total), seen.device)]
        sampled = seen.shape[1] < total and config.num_iters > 1
        early = seen[:, :: EARLY_STRIDE if sampled else 1]
        bases = initial_bases(early, NUM_BASES).to(tokens.dtype)
        bases = eager_soft_em(early, bases, num_iters=config.num_iters - 1)
        sums, mass, _ = eager_em_statistics(seen, bases)
        bases = sums / (mass + 1e-4).unsqueeze(-1)
        bias = attention_bias(mass, empty=config.empty, proportional=config.proportional)
        if config.calibration == "moments":
            correction = _moments(attention, seen, bases, config)
        seen = bases
    key, value = (_projected(project, seen) for project in (attention.to_k, attention.to_v))
    mixed = eager_basis_attention(asking, key, value, bias=bias)
    if correction is not None:
        mixed = mixed + asking @ correction
    return attention.to_out[0](mixed.transpose(1, 2).flatten(2))


def _projected(project: torch.nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """Heads [B, h, n, d] of rows [B, n, C]."""
    return project(rows).unflatten(-1, (HEADS, -1)).transpose(1, 2)


def _moments(
    attention: Attention, read: torch.Tensor, bases: torch.Tensor, config: StemConfig
) -> torch.Tensor:
    """The matrix [B, h, d, d] of `calibration="moments"`, in the tokens' dtype."""
    count = min(read.shape[1], MOMENTS_TOKENS)
    some = read[:, spread_tokens(read.shape[1], count, read.device, other=True)]
    key, value, base_key, base_value = (
        _projected(project, rows)
        for rows in (some, bases)
        for project in (attention.to_k, attention.to_v)
    )
    asking = _projected(attention.to_q, some[:, ::MOMENTS_STEP])
    found = eager_moments(
        asking, some, key, value, bases, base_key, base_value, temperature=config.temperature
    )
    return found[..., :-1, :]  # the last row is the constant, 0
