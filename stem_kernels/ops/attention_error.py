"""How far attention through bases is from exact attention, on the caller's own tensors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .stem_attention import exact_attention, stem_attention

CHUNK_LOGITS = 2**24


class AttentionError(NamedTuple):
    """Relative errors |out - exact| / |exact|: of the whole output, and of its worst head.

    The norms are over tokens and channels (over all heads too, or within one). 0.01 is 1 %.
    """

    overall: float
    worst_head: float


def attention_error(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    **options: Any,
) -> AttentionError:
    """How far `stem_attention` is from `scaled_dot_product_attention` on these tensors.

    SDPA computes the exact attention in float32 (float64 for float64 tensors), for some queries at
    a time. So memory does not grow as n x m; time does.

    Args:
        query: Queries [B, h, n, d]. To save time, pass only some of the queries, with
            `allow_exact=False`, because `stem_attention` is exact for few queries.
        key: Keys [B or 1, h, m, d].
        value: Values [B or 1, h, m, e].
        scale: Factor of the attention logits; 1 / sqrt(d) if None.
        options: Keyword arguments of `stem_attention`, such as `num_bases`.

    Returns:
        AttentionError. If `stem_attention` is exact, the error is the rounding of the dtype.

    Raises:
        ValueError, TypeError, BackendError: as `stem_attention` does.
    """
    with torch.no_grad():
        out = stem_attention(query, key, value, scale=scale, **options)
        if out.numel() == 0:
            return AttentionError(0.0, 0.0)
        compute = torch.promote_types(query.dtype, torch.float32)
        key, value = key.to(compute), value.to(compute)
        scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
        batch, heads = query.shape[:2]
        at_once = max(1, CHUNK_LOGITS // (batch * heads * key.shape[-2]))
        difference = torch.zeros(batch, heads, dtype=compute, device=query.device)
        size = torch.zeros_like(difference)
        for tokens, part in zip(query.split(at_once, -2), out.split(at_once, -2), strict=True):
            exact = exact_attention(tokens.to(compute), key, value, scale)
            difference += (part - exact).square().sum((-2, -1))
            size += exact.square().sum((-2, -1))
    # Values may be zero, and an output of zeros is then right.
    least = torch.finfo(compute).tiny
    overall = difference.sum() / size.sum().clamp(min=least)
    worst = (difference / size.clamp(min=least)).max()
    return AttentionError(float(overall.sqrt()), float(worst.sqrt()))
