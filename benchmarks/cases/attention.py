"""Attention of many queries to the bases, against every SDPA backend; of a few to all tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels import basis_attention
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.ops.calibration import MOMENTS_ATOL, MOMENTS_TOKENS, moments
from stem_kernels.ops.partial_attention import ROUNDING_ATOL as PARTIAL_ATOL
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.ops.projected_attention import projected_attention
from stem_kernels.testing import (
    clustered_tokens,
    eager_basis_attention,
    eager_moments,
    eager_projected_attention,
)

from .case import Call, Case, Check, Contender, Outputs, UnavailableError, ours, parity
from .em import NUM_BASES
from .floors import Work

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
"""The names of contenders."""
REFUSALS = (
    "No available kernel",  # on a GPU
    "No viable backend",  # on a CPU
    "cuDNN Frontend error",
    "CUDNN_STATUS_NOT_SUPPORTED",
)
CHECKED = 4096
CHECKED_OF_FEW = 16

QueryKeyValue = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


class ToBases(NamedTuple):
    """The arguments of `basis_attention`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    bias: torch.Tensor | None = None
    correction: torch.Tensor | None = None
    query_mean: torch.Tensor | None = None


def attention_case(
    heads: int,
    tokens: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_bases: int = NUM_BASES,
    extra: str = "",
) -> Case[ToBases]:
    """Queries as a projection leaves them, views [1, h, n, d] of [1, n, h, d], to the bases.

    Args:
        heads: Number h of heads.
        tokens: Number n of queries.
        width: Number d of channels of a head.
        device: Device of the inputs.
        dtype: Type of queries, keys and values.
        num_bases: Number K of bases.
        extra: Name of what there is beside them, "", "bias", or "correction" with a bias; with any
            the backends compete alone.
    """

    def inputs() -> ToBases:
        query = clustered_tokens((1, tokens, heads, width)).to(device, dtype).transpose(1, 2)
        key, value = (
            clustered_tokens((1, heads, num_bases, width), seed=seed).to(device, dtype)
            for seed in (1, 2)
        )
        found = ToBases(query, key, value)
        if extra:
            found = found._replace(bias=torch.linspace(-3, 3, num_bases, device=device)[None, None])
        if extra == "correction":
            matrix = clustered_tokens((1, heads, width + 1, width), seed=3).to(device)
            mean = query.mean(-2, dtype=torch.float32)
            found = found._replace(correction=matrix / width**0.5, query_mean=mean)
        return found

    def run(inputs: ToBases, backend: str) -> Outputs:
        return (basis_attention(**inputs._asdict(), backend=backend),)

    pairs = heads * tokens * num_bases
    work = Work(4.0 * pairs * width, pairs, 2 * heads * tokens * width * dtype.itemsize)
    return Case(
        f"basis attention d={width}" + (f" with {extra}" if extra else ""),
        f"q {tokens} h={heads} d={width} K={num_bases}",
        dtype,
        inputs,
        ours(run) | ({} if extra else {name: sdpa(backend) for name, backend in SDPA.items()}),
        check,
        None if extra else work,
    )


def check(inputs: ToBases) -> Check:
    """Against float64, for the first queries."""
    few = inputs._replace(query=inputs.query[:, :, :CHECKED])
    right = parity(
        (eager_attention(few, torch.float64),),
        (eager_attention(few, inputs.query.dtype),),
        ROUNDING_ATOL,
    )
    return lambda answer: right((answer[0][:, :, :CHECKED],))


def eager_attention(inputs: ToBases, dtype: torch.dtype) -> torch.Tensor:
    """All of it in one dtype."""
    query, key, value = (part.to(dtype) for part in inputs[:3])
    bias, correction, mean = (None if part is None else part.to(dtype) for part in inputs[3:])
    return eager_basis_attention(
        query, key, value, bias=bias, correction=correction, query_mean=mean
    )


class Projected(NamedTuple):
    """The arguments of `projected_attention` in their order."""

    tokens: torch.Tensor
    query_weight: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    output_weight: torch.Tensor


def projected_case(
    heads: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> Case[Projected]:
    """A layer's tokens to bases, from its first projection to its last."""
    channels = heads * width

    def inputs() -> Projected:
        shapes = (
            (1, tokens, channels), (channels, channels), (1, heads, NUM_BASES, width),
            (1, heads, NUM_BASES, width), (channels, channels),
        )  # fmt: skip
        found = [clustered_tokens(shape, seed=seed) for seed, shape in enumerate(shapes)]
        for place in (1, 4):
            found[place] /= channels**0.5
        return Projected(*(part.to(device, dtype) for part in found))

    def run(inputs: Projected, backend: str) -> Outputs:
        return (projected_attention(*inputs, backend=backend),)

    pairs = heads * tokens * NUM_BASES
    flops = 4.0 * tokens * channels**2 + 4.0 * pairs * width
    return Case(
        f"projected attention d={width}",
        f"n={tokens} C={channels} h={heads} d={width} K={NUM_BASES}",
        dtype,
        inputs,
        ours(run),
        projected_check,
        Work(flops, pairs, 2 * tokens * channels * dtype.itemsize),
    )


def projected_check(inputs: Projected) -> Check:
    """Against float64, for the first tokens."""
    few = inputs._replace(tokens=inputs.tokens[:, :CHECKED])
    exact, same = (
        eager_projected_attention(*(part.to(dtype) for part in few))
        for dtype in (torch.float64, inputs.tokens.dtype)
    )
    right = parity((exact,), (same,), ROUNDING_ATOL)
    return lambda answer: right((answer[0][:, :CHECKED],))


def sdpa(backend: SDPBackend) -> Contender[ToBases]:
    """torch's attention on one of its backends."""

    def start(inputs: ToBases) -> Call:
        def run() -> Outputs:
            with sdpa_kernel(backend):
                return (scaled_dot_product_attention(*inputs[:3]),)

        try:
            run()
        except RuntimeError as problem:
            if not any(text in str(problem) for text in REFUSALS):
                raise
            raise UnavailableError(f"SDPA: {problem}") from problem
        return run

    return Contender(start)


def partial_case(
    heads: int, queries: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype
) -> Case[QueryKeyValue]:
    """A calibration's queries to all tokens, keys and values as projections leave them."""

    def inputs() -> QueryKeyValue:
        query = clustered_tokens((1, heads, queries, width)).to(device, dtype)
        key, value = (
            clustered_tokens((1, tokens, heads, width), seed=seed).to(device, dtype).transpose(1, 2)
            for seed in (1, 2)
        )
        return query, key, value

    pairs = heads * queries * tokens
    return Case(
        f"partial attention d={width}",
        f"q {queries} n={tokens} h={heads} d={width}",
        dtype,
        inputs,
        ours(lambda inputs, backend: tuple(partial_attention(*inputs, backend=backend))),
        partial_check,
        Work(4.0 * pairs * width, pairs, 2 * heads * tokens * width * dtype.itemsize),
    )


def partial_check(inputs: QueryKeyValue) -> Check:
    """Against float64, for the first queries."""

    def eager(dtype: torch.dtype) -> Outputs:
        query, key, value = (part.to(dtype) for part in inputs)
        logits = query[:, :, :CHECKED_OF_FEW] @ key.mT * query.shape[-1] ** -0.5
        return torch.softmax(logits, -1) @ value, logits.logsumexp(-1)

    right = parity(eager(torch.float64), eager(inputs[0].dtype), PARTIAL_ATOL)
    return lambda answer: right(tuple(part[:, :, :CHECKED_OF_FEW] for part in answer))


def moments_case(
    heads: int, width: int, device: torch.device, dtype: torch.dtype
) -> Case[tuple[torch.Tensor, ...]]:
    """The moments of a layer's sample, in feature space, as projections leave keys and values."""
    tokens, channels = MOMENTS_TOKENS, heads * width

    def inputs() -> tuple[torch.Tensor, ...]:
        features = clustered_tokens((1, tokens, channels)).to(device, dtype)
        bases = features[:, :: tokens // NUM_BASES].float()
        query, key, value, base_key, base_value = (
            clustered_tokens((1, rows, heads, width), seed=seed).to(device, dtype).transpose(1, 2)
            for seed, rows in enumerate((NUM_BASES, tokens, tokens, NUM_BASES, NUM_BASES))
        )
        return query, features, key, value, bases, base_key, base_value

    def call(inputs: tuple[torch.Tensor, ...], backend: str) -> Outputs:
        query, features, key, value, *of_bases = inputs
        found = moments(query, features, key, value, *of_bases, temperature=1.0, backend=backend)
        return (found.correction,)

    return Case(
        f"moments d={width}", f"m={tokens} C={channels} h={heads}", dtype, inputs, ours(call),
        moments_check,
    )  # fmt: skip


def moments_check(inputs: tuple[torch.Tensor, ...]) -> Check:
    """Against float64."""
    exact, same = (
        eager_moments(*(part.to(dtype) for part in inputs), temperature=1.0)
        for dtype in (torch.float64, inputs[0].dtype)
    )
    return parity((exact,), (same,), MOMENTS_ATOL, float(inputs[1].double().norm(dim=-1).max()))
