"""Attention of many queries to the bases, against every SDPA backend."""

from __future__ import annotations

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels import basis_attention
from stem_kernels.ops.basis_attention import ROUNDING_ATOL
from stem_kernels.testing import clustered_tokens, eager_basis_attention

from .cases import Call, Case, Check, Contender, Outputs, UnavailableError, ours, parity
from .em_cases import NUM_BASES
from .floors import Work

SDPA = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}
"""The names of contenders."""
REFUSALS = ("No available kernel", "No viable backend")  # on a GPU, on a CPU
CHECKED = 4096

QueryKeyValue = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def attention_case(
    heads: int,
    tokens: int,
    width: int,
    device: torch.device,
    dtype: torch.dtype,
    *,
    num_bases: int = NUM_BASES,
) -> Case[QueryKeyValue]:
    """Queries as a projection leaves them, views [1, h, n, d] of [1, n, h, d], to the bases."""

    def inputs() -> QueryKeyValue:
        query = clustered_tokens((1, tokens, heads, width)).to(device, dtype).transpose(1, 2)
        key, value = (
            clustered_tokens((1, heads, num_bases, width), seed=seed).to(device, dtype)
            for seed in (1, 2)
        )
        return query, key, value

    pairs = heads * tokens * num_bases
    return Case(
        f"basis attention d={width}",
        f"q {tokens} h={heads} d={width} K={num_bases}",
        dtype,
        inputs,
        {
            **ours(lambda inputs, backend: (basis_attention(*inputs, backend=backend),)),
            **{name: sdpa(backend) for name, backend in SDPA.items()},
        },
        check,
        Work(4.0 * pairs * width, pairs, 2 * heads * tokens * width * dtype.itemsize),
    )


def check(inputs: QueryKeyValue) -> Check:
    """Against float64, for the first queries."""
    query, key, value = inputs
    some = query[:, :, :CHECKED]
    right = parity(
        (eager_basis_attention(some.double(), key.double(), value.double()),),
        (eager_basis_attention(some, key, value),),
        ROUNDING_ATOL,
    )
    return lambda answer: right((answer[0][:, :, :CHECKED],))


def sdpa(backend: SDPBackend) -> Contender[QueryKeyValue]:
    """torch's attention on one of its backends."""

    def start(inputs: QueryKeyValue) -> Call:
        def run() -> Outputs:
            with sdpa_kernel(backend):
                return (scaled_dot_product_attention(*inputs),)

        try:
            run()
        except RuntimeError as problem:
            if not any(text in str(problem) for text in REFUSALS):
                raise
            raise UnavailableError(f"SDPA: {problem}") from problem
        return run

    return Contender(start)
