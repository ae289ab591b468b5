"""Attention to a few bases whose weights differ from place to place."""

from __future__ import annotations

import torch

from ..reference.placed_attention import placed_attention_torch
from .basis_attention import check_bases
from .checks import check_floating, check_same_dtype
from .partial_attention import PartialAttention

OP = "placed_attention"


def placed_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    bias: torch.Tensor | None = None,
    matrix: torch.Tensor | None = None,
    scale: float | None = None,
) -> PartialAttention:
    r"""`basis_attention` with a bias for each place, and the log of its denominator.

    The n queries are F times P places, and those of one place share a bias. This is equivalent to
    the following, but never holds the weights `[B, h, n, K]`:

        logits = query @ key.mT * scale + bias.repeat(1, 1, n // P, 1)
        output = torch.softmax(logits, -1) @ value + query @ matrix * scale
        return output, torch.logsumexp(logits, -1)

    Args:
        query: Queries [B, h, n, d], any strides, one frame of P places after the other.
        key: Keys [B or 1, h, K, d] of the same dtype.
        value: Values [B or 1, h, K, e] of the same dtype.
        bias: Bias of the logits, floating, [B or 1, h or 1, P, K], n a multiple of P; -inf leaves
            a base out. None: none.
        matrix: Matrix [B or 1, h or 1, d, e], floating, that is applied to the queries and added
            to the output, see `video_bases`. None: nothing is added.
        scale: Factor of the logits; 1 / sqrt(d) if None.

    Returns:
        `PartialAttention` in float32 (float64 for float64 input). A query whose bases are all left
        out has the output NaN and the logsumexp -inf, which `merged_attention` with other keys
        makes good. Plain torch computes it on every device; equal calls give equal bits.

    Raises:
        ValueError, TypeError: shapes or dtypes that do not fit.

    Source: this package's.
    """
    check_floating(OP, query=query, key=key, value=value, bias=bias, matrix=matrix)
    check_same_dtype(OP, query=query, key=key, value=value)
    check_bases(OP, query, key, value)
    batch, heads, num_queries, width = query.shape
    num_bases, value_width = value.shape[-2:]
    if bias is not None:
        _check_shared(bias, "bias", (batch, heads))
        places = bias.shape[-2]
        if bias.shape[-1] != num_bases or places < 1 or num_queries % places:
            raise ValueError(
                f"{OP}: bias is {list(bias.shape)}; its last sizes must be P and K = {num_bases}, "
                f"and the {num_queries} queries a multiple of P"
            )
        bias = bias.expand(batch, heads, -1, -1)
    if matrix is not None:
        _check_shared(matrix, "matrix", (batch, heads))
        if tuple(matrix.shape[-2:]) != (width, value_width):
            raise ValueError(
                f"{OP}: matrix is {list(matrix.shape)}; its last sizes must be those of query and "
                f"value, {width} and {value_width}"
            )
        matrix = matrix.expand(batch, heads, -1, -1)
    scale = width**-0.5 if scale is None else float(scale)
    key, value = (tensor.expand(batch, *tensor.shape[1:]) for tensor in (key, value))
    return PartialAttention(*placed_attention_torch(query, key, value, bias, matrix, scale))


def _check_shared(tensor: torch.Tensor, name: str, lead: tuple[int, int]) -> None:
    """It has four sizes, and one or all of the batch and of the heads."""
    fits = tensor.ndim == 4 and all(
        size in (1, whole) for size, whole in zip(tensor.shape[:2], lead, strict=True)
    )
    if not fits:
        raise ValueError(
            f"{OP}: {name} is {list(tensor.shape)}; it must have four sizes, the first {lead[0]} "
            f"or 1, the second {lead[1]} or 1"
        )
