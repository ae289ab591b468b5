"""Exact attention of a few queries to many keys, in parts that can be merged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..reference.partial_attention import partial_attention_torch
from ..verification import attention, run
from ..verification.comparison import Comparison
from .checks import check_floating, check_same_dtype, check_width

OP = "partial_attention"

ROUNDING_ATOL = {torch.float32: 1e-6, torch.float16: 1e-6, torch.bfloat16: 1e-6}
"""Part of the parity bound, relative to the largest |reference|: results are float32 whatever
the input."""


class PartialAttention(NamedTuple):
    """Attention to some of the keys: output [B, h, m, e], log of the sum of exponentials
    [B, h, m]; float32 or float64."""

    output: torch.Tensor
    logsumexp: torch.Tensor


def partial_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> PartialAttention:
    r"""Exact attention of a few queries to many keys, and the log of its denominator.

    Equivalent to, without ever holding the weights `[B, h, m, n]`:

        logits = query @ key.mT * scale
        return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1)

    With the second result attentions to parts of the keys make that to all of them, see
    `merged_attention`. It takes 2 m n (d + e) FLOPs a head, those of `basis_attention` of all n
    tokens to as many bases as there are queries here, and it reads every key and value once.

    The keys of tokens x [n, C] are projections x W. Logits could be had without them, as
    x (W q) with m queries a head in feature space: 2 n m C h FLOPs in place of 2 n C (C + m) for
    projection and logits of all h heads. That is less only where m (h - 1) < C. Stable Diffusion
    1.5 has h = 8 and C of 1,280 at most; with m = 256 projecting takes 0.28 (C = 320), 0.44 (640)
    and 0.75 (1,280) times as many FLOPs, and values count the same. So keys are taken projected.

    Args:
        query: Queries [B, h, m, d], any strides; m may be 0, B, h and d are at least 1.
        key: Keys [B, h, n, d] of the same dtype, n >= 1.
        value: Values [B, h, n, e] of the same dtype.
        scale: Factor of the logits; 1 / sqrt(d) if None.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        `PartialAttention`, in float32 (float64 for float64 input): not rounded to the input's
        dtype, because parts are yet to be merged. A query whose logits are all -inf has the output
        NaN and the logsumexp -inf, which `merged_attention` with other keys makes good. Keys are
        cut into parts, each on a core of its own, by the shapes and the device and merged in
        order: equal calls give equal bits.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: the split over keys is that of flash-decoding (Dao and others, 2023).
    """
    check_floating(OP, query=query, key=key, value=value)
    check_same_dtype(OP, query=query, key=key, value=value)
    fits = (
        query.ndim == key.ndim == value.ndim == 4
        and key.shape[:2] == value.shape[:2] == query.shape[:2]
        and key.shape[2] == value.shape[2]
        and key.shape[3] == query.shape[3]
        and min(key.shape[:3]) >= 1
    )
    if not fits:
        raise ValueError(
            f"{OP}: query must be [B, h, m, d], key [B, h, n, d] and value [B, h, n, e], B, h and "
            "n at least 1; they are "
            f"{list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    check_width(OP, "query", query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query, key, value, scale)

    def on(chosen: str) -> PartialAttention:
        if chosen == "triton":
            from ..triton.attention.partial import partial_attention_triton

            return PartialAttention(*partial_attention_triton(*arguments))
        if chosen == "cuda":
            from ..cuda.partial_attention import partial_attention_cuda

            return PartialAttention(*partial_attention_cuda(*arguments))
        assert chosen == "torch"
        return PartialAttention(*partial_attention_torch(*arguments))

    def check(found: PartialAttention, _: str) -> list[Comparison] | None:
        return attention.partial_attention(found, *arguments, ROUNDING_ATOL)

    return run(OP, backend, {"query": query, "key": key, "value": value}, 0, on, check)


def merged_attention(parts: Sequence[PartialAttention]) -> PartialAttention:
    r"""Attention to the keys of all parts, of attentions to each of them.

    $$\ell = \log \textstyle\sum_i e^{\ell_i}, \quad o = \sum_i e^{\ell_i - \ell}\, o_i$$

    taken one part after the other, so the same parts in the same order give the same bits. One
    part is returned as it is.

    Args:
        parts: Attentions of the same queries, one at least, all of one shape.

    Returns:
        `PartialAttention` as over the keys of all parts at once.

    Raises:
        ValueError: there is no part.
    """
    if not parts:
        raise ValueError("merged_attention: there are no parts; there must be one at least")
    output, logsumexp = parts[0]
    if len(parts) == 1:
        return parts[0]
    for part in parts[1:]:
        total = torch.logaddexp(logsumexp, part.logsumexp)
        output, others = (
            # The attention to keys that all have the logit -inf is NaN, and 0 times NaN would be.
            attended.masked_fill(share == 0, 0.0) * share
            for attended, share in (
                (one.output, _share(one.logsumexp, total).unsqueeze(-1))
                for one in (PartialAttention(output, logsumexp), part)
            )
        )
        output = output + others
        logsumexp = total
    nowhere = (logsumexp == float("-inf")).unsqueeze(-1)
    return PartialAttention(output.masked_fill(nowhere, float("nan")), logsumexp)


def _share(own: torch.Tensor, total: torch.Tensor) -> torch.Tensor:
    """The share that a part has in the whole; 0 where it has nothing, whatever the others have."""
    return (own - total).exp().masked_fill(own == float("-inf"), 0.0)
