"""Inputs of the emulated kernels, and checks of their answers against float64."""

from __future__ import annotations

import torch

from stem_kernels.ops.basis_attention import ROUNDING_ATOL as ATTENTION_ATOL
from stem_kernels.ops.em_statistics import ROUNDING_ATOL as EM_ATOL
from stem_kernels.testing import (
    clustered_tokens,
    eager_basis_attention,
    eager_em_statistics,
    max_error,
    parity_bound,
)

from . import NAN


def interleaved(tokens: torch.Tensor, padding: int) -> torch.Tensor:
    """The same [B, h, n, D] as a view of memory [B, n, h, D + padding] that is NaN elsewhere."""
    batch, heads, n, width = tokens.shape
    memory = torch.full((batch, n + 2, heads, width + padding), NAN, dtype=tokens.dtype)
    view = memory[:, 1 : n + 1, :, :width].transpose(1, 2)
    view.copy_(tokens)
    return view


def em_case(
    n: int, num_bases: int, width: int, payload_width: int, padding: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    lead = (2, 2) if num_bases <= 100 else (1, 2)
    features = interleaved(clustered_tokens((*lead, n, width), seed=n).to(dtype), padding)
    bases = clustered_tokens((*lead, num_bases, width), seed=1)
    payload = None
    if payload_width:
        values = clustered_tokens((*lead, n, payload_width), seed=2).to(dtype)
        payload = interleaved(values, padding)
    return features, bases, payload


def check_em(
    found: tuple[torch.Tensor, ...],
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool = True,
) -> None:
    settings = {"temperature": temperature, "normalize": normalize}
    double = None if payload is None else payload.double()
    exact = eager_em_statistics(features.double(), bases.double(), payload=double, **settings)
    plain = eager_em_statistics(features, bases, payload=payload, **settings)
    largest_logit = float(features.double().norm(dim=-1).max()) / temperature
    for result, expected, same_dtype in zip(found, exact, plain, strict=True):
        if expected is None:
            assert result.numel() == 0
            continue
        bound = parity_bound(expected, same_dtype, EM_ATOL, largest_logit)
        assert max_error(result, expected) <= bound
        if features.dtype == torch.float32:
            assert max_error(result, expected) <= 1e-5 * float(expected.abs().max())


def attention_case(
    n: int, num_bases: int, width: int, value_width: int, padding: int, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    query = interleaved(clustered_tokens((2, 2, n, width), seed=n).to(dtype), padding)
    key = interleaved(clustered_tokens((1, 2, num_bases, width), seed=1).to(dtype), padding)
    value = interleaved(clustered_tokens((1, 2, num_bases, value_width), seed=2).to(dtype), padding)
    bias = clustered_tokens((1, 2, num_bases), seed=3)
    bias[..., 1::3] = float("-inf")
    bias[..., :64] += 2.0
    return query, *(tensor.expand(2, *tensor.shape[1:]) for tensor in (key, value, bias))


def check_attention(
    found: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    wide = None if bias is None else bias.double()
    exact = eager_basis_attention(query.double(), key.double(), value.double(), bias=wide)
    plain = eager_basis_attention(query, key, value, bias=bias)
    error = max_error(found.transpose(1, 2), exact)
    assert error <= parity_bound(exact, plain, ATTENTION_ATOL)
    if query.dtype == torch.float32:
        assert error <= 1e-5 * float(exact.abs().max())
