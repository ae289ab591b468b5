"""What operators return, not yet filled: their outputs of no tokens, and those of shapes alone.

A function here takes an operator's arguments in their order, those that it does not need as a
rest: `torch.library.register_fake` takes it as it is, whatever the backend.
"""

from __future__ import annotations

import torch


def compute_dtype(tensor: torch.Tensor) -> torch.dtype:
    """float64 for float64, else float32: what logits, softmax and sums are computed in."""
    return torch.promote_types(tensor.dtype, torch.float32)


def attention_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> torch.Tensor:
    """[B, n, h, e] of queries [B, h, n, d] and values [.., h, K, e], of the queries' dtype."""
    batch, heads, n, _dim = query.shape
    return query.new_empty((batch, n, heads, value.shape[-1]))


def blended_output(
    query_target: torch.Tensor,
    key_target: torch.Tensor,
    query_source: torch.Tensor,
    key_source: torch.Tensor,
    value: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    """As `attention_output`, of the target's queries."""
    return attention_output(query_target, key_target, value)


def projected_output(
    tokens: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    *_: object,
) -> torch.Tensor:
    """[B, n, E] of tokens [B, n, C] and a weight [E, h e], of the tokens' dtype."""
    return tokens.new_empty((*tokens.shape[:2], output_weight.shape[0]))


def partial_output(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, h, m, e] and the logsumexp [B, h, m] of queries [B, h, m, d], in `compute_dtype`."""
    dtype = compute_dtype(query)
    output = query.new_empty((*query.shape[:-1], value.shape[-1]), dtype=dtype)
    return output, query.new_empty(query.shape[:-1], dtype=dtype)


def moments_output(
    query: torch.Tensor, features: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """[B, h, d + 1, e] and [B, h, d] of queries [B or 1, h, r, d], keys [B or 1, h, m, d] and
    values [B or 1, h, m, e], in `compute_dtype`."""
    dtype, batch = compute_dtype(key), max(query.shape[0], key.shape[0])
    heads, dim = key.shape[1], key.shape[-1]
    correction = key.new_empty((batch, heads, dim + 1, value.shape[-1]), dtype=dtype)
    return correction, key.new_empty((batch, heads, dim), dtype=dtype)


def nearest_output(query: torch.Tensor, *_: object) -> torch.Tensor:
    """int32 [..., n] of queries [..., n, d]."""
    return query.new_empty(query.shape[:-1], dtype=torch.int32)


def statistics_output(
    features: torch.Tensor, bases: torch.Tensor, payload: torch.Tensor | None, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Sums [..., K, D], mass [..., K] and payload sums [..., K, E or 0], in `compute_dtype`."""
    dtype = compute_dtype(features)
    lead = (*features.shape[:-2], bases.shape[-2])
    width = 0 if payload is None else payload.shape[-1]
    return (
        features.new_empty((*lead, features.shape[-1]), dtype=dtype),
        features.new_empty(lead, dtype=dtype),
        features.new_empty((*lead, width), dtype=dtype),
    )


def em_output(
    features: torch.Tensor, bases: torch.Tensor, payload: torch.Tensor | None, *_: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Bases, payload bases and mass, shaped as `statistics_output`'s sums."""
    found, mass, payload_bases = statistics_output(features, bases, payload)
    return found, payload_bases, mass
