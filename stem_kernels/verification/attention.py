"""Attentions, and the nearest token, against torch in float64 on some of their queries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn.functional import linear

from ..reference.basis_attention import add_correction, basis_attention_eager
from ..reference.partial_attention import partial_attention_eager
from ..shared.cosine import cosine_loss
from .comparison import ROWS, Comparison, Rounding, compared, finite, places, products, rounded

BATCHES = 4


def basis_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
    scale: float,
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments as for `reference.basis_attention`, `out` [B, n, h, e] a backend's."""
    if out.numel() == 0:
        return None
    part = _Part(query, value.shape[-2])
    query, key, value = part.of_rows(query), part.of_batch(key), part.of_batch(value)
    bias, matrix, mean = (
        None if tensor is None else part.of_batch(tensor)
        for tensor in (bias, correction, query_mean)
    )
    if not finite(query, key, value, matrix, mean):
        return None
    exact = basis_attention_eager(query.double(), key.double(), value.double(), bias, scale)
    plain, largest = _plain(query, key, value, bias, scale)
    for found in (exact, plain):
        if matrix is not None and mean is not None:
            add_correction(found, query.to(found.dtype), matrix, mean)
    one = compared(
        "output", part.of_output(out), exact, rounded(plain, query.dtype), query.dtype, rounding,
        largest,
    )  # fmt: skip
    return one and [one]


def blended_attention(
    out: torch.Tensor,
    query_target: torch.Tensor,
    key_target: torch.Tensor,
    query_source: torch.Tensor,
    key_source: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments as for `reference.blended_attention`, `out` [B, n, h, e] a backend's."""
    if out.numel() == 0:
        return None
    part, dtype = _Part(query_target, value.shape[-2]), query_target.dtype
    queries = part.of_rows(query_target), part.of_rows(query_source)
    keys = part.of_batch(key_target), part.of_batch(key_source)
    value, bias = part.of_batch(value), None if bias is None else part.of_batch(bias)
    share = mask[part.batches][:, part.tokens]
    if not finite(*queries, *keys, value, share):
        return None
    maps = tuple(zip(queries, keys, strict=True))
    exact = _blended(
        share.double(),
        *(
            basis_attention_eager(query.double(), key.double(), value.double(), bias, scale)
            for query, key in maps
        ),
    )
    (target, one), (source, other) = (_plain(query, key, value, bias, scale) for query, key in maps)
    plain = _blended(share.float(), target, source)
    found = compared(
        "output", part.of_output(out), exact, rounded(plain, dtype), dtype, rounding,
        max(one, other),
    )  # fmt: skip
    return found and [found]


def projected_attention(
    out: torch.Tensor,
    tokens: torch.Tensor,
    query_weight: torch.Tensor,
    query_bias: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor,
    output_weight: torch.Tensor,
    output_bias: torch.Tensor | None,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
    scale: float,
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments as for `ops.projected_attention`, `out` [B, n, E] a backend's."""
    if out.numel() == 0:
        return None
    dtype = tokens.dtype
    batches = places(len(tokens), BATCHES, tokens.device)
    most = products(tokens.device) // (query_weight.numel() + output_weight.numel())
    rows = places(tokens.shape[1], max(2, min(ROWS, most) // len(batches)), tokens.device)

    def of_batch(tensor: torch.Tensor) -> torch.Tensor:
        return tensor if len(tensor) == 1 else tensor[batches]

    tokens, out = (part[batches[:, None], rows] for part in (tokens, out))
    key, value = of_batch(key), of_batch(value)
    bias, matrix, mean = (
        None if part is None else of_batch(part) for part in (bias, correction, query_mean)
    )
    weights = (query_weight, query_bias, output_weight, output_bias)
    if not finite(tokens, key, value, matrix, mean, *weights):
        return None

    def made(
        cast: Callable[[torch.Tensor], torch.Tensor], exactly: bool
    ) -> tuple[torch.Tensor, float]:
        added = [None if part is None else cast(part) for part in (query_bias, output_bias)]
        query = linear(cast(tokens), cast(query_weight), added[0])
        query = query.unflatten(-1, (key.shape[1], -1)).transpose(1, 2)
        if exactly:
            found, largest = basis_attention_eager(query, cast(key), cast(value), bias, scale), 0.0
        else:
            query = query.to(dtype)
            found, largest = _plain(query, key, value, bias, scale)
        if matrix is not None and mean is not None:
            add_correction(found, query, matrix, mean)
        found = found if exactly else rounded(found, dtype)
        return linear(found.flatten(2), cast(output_weight), added[1]), largest

    exact, _ = made(torch.Tensor.double, True)
    plain, largest = made(lambda part: rounded(part, dtype), False)
    one = compared("output", out, exact, rounded(plain, dtype), dtype, rounding, largest)
    return one and [one]


def partial_attention(
    found: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments as for `reference.partial_attention`; two leads, and a few queries of each."""
    output, logsumexp = found
    if output.numel() == 0:
        return None
    batch, heads, m, dim = query.shape
    each = 2 * key.shape[-2] * (dim + value.shape[-1])
    leads = places(batch * heads, 2, query.device)
    rows = places(m, min(ROWS // 2, products(query.device) // each), query.device)
    chosen = leads // heads, leads % heads
    # [1, leads, ...]
    query, output, logsumexp = (
        tensor[chosen].index_select(1, rows).unsqueeze(0) for tensor in (query, output, logsumexp)
    )
    key, value = (tensor[chosen].unsqueeze(0) for tensor in (key, value))
    if not finite(query, key, value):
        return None
    exact = partial_attention_eager(query.double(), key.double(), value.double(), scale)
    plain, largest, plain_logsumexp = _weighed(query, key, value, None, scale)
    dtype = query.dtype
    listed = (
        compared("output", output, exact[0], plain, dtype, rounding, largest),
        compared("logsumexp", logsumexp, exact[1], plain_logsumexp, dtype, rounding, largest),
    )
    return [one for one in listed if one is not None]


def nearest_token(
    found: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, rounding: Rounding
) -> list[Comparison] | None:
    """Arguments as for `reference.nearest_token`, `found` a backend's."""
    if found.numel() == 0:
        return None
    leads = places(len(query), 2, query.device)
    most = products(query.device) // (2 * keys.shape[1] * keys.shape[2])
    rows = places(query.shape[1], min(ROWS // 2, most), query.device)
    query, keys, found = query[leads][:, rows], keys[leads], found[leads][:, rows]
    if not finite(query, keys):
        return None
    dtype = query.dtype
    # Sums of d products of cosines, where operands are what the kernel multiplies.
    bound = rounding[dtype] + keys.shape[2] ** 0.5 * torch.finfo(torch.float32).eps
    lost = cosine_loss(rounded(query, dtype), rounded(keys, dtype), found)
    return [Comparison("number of the nearest key", lost, 2 * bound)]


class _Part:
    """Some batch entries and tokens of queries [B, h, n, d], all heads of them."""

    def __init__(self, query: torch.Tensor, num_bases: int) -> None:
        batch, heads, n, dim = query.shape
        self.batches = places(batch, BATCHES, query.device)
        most = products(query.device) // (num_bases * dim)
        rows = min(ROWS, most) // (len(self.batches) * heads)
        self.tokens = places(n, max(2, rows), query.device)

    def of_rows(self, tensor: torch.Tensor) -> torch.Tensor:
        """[b, h, rows, d] of queries [B, h, n, d]."""
        return tensor.index_select(0, self.batches).index_select(2, self.tokens)

    def of_output(self, tensor: torch.Tensor) -> torch.Tensor:
        """[b, rows, h, e] of [B, n, h, e]."""
        return tensor.index_select(0, self.batches).index_select(1, self.tokens)

    def of_batch(self, tensor: torch.Tensor) -> torch.Tensor:
        """[b or 1, ...] of what belongs to batch entries."""
        return tensor if tensor.shape[0] == 1 else tensor.index_select(0, self.batches)


def _blended(share: torch.Tensor, target: torch.Tensor, source: torch.Tensor) -> torch.Tensor:
    """[b, rows, h, e], of shares [b, rows]; a map without a share may be NaN."""
    share = share[:, :, None, None]
    mixed = share * target + (1 - share) * source
    return torch.where(share == 1, target, torch.where(share == 0, source, mixed))


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, float]:
    """Output [b, rows, h, e] rounded where kernels round, and the largest logit."""
    out, largest, _ = _weighed(query, key, value, bias, scale)
    return out.transpose(1, 2).contiguous(), largest


def _weighed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, float, torch.Tensor]:
    """Output [b, h, rows, e], the largest logit, and the logsumexp [b, h, rows]; float32."""
    dtype = query.dtype
    query, key, value = (rounded(tensor, dtype) for tensor in (query, key, value))
    logits = query @ key.mT * scale
    largest = float(logits.abs().max())
    if bias is not None:
        logits = logits + bias.float().unsqueeze(-2)
    # Kernels divide by the sum at the end: the largest weight is 1.
    weights = (logits - logits.amax(-1, keepdim=True)).exp()
    out = rounded(weights, dtype) @ value / weights.sum(-1, keepdim=True)
    return out, largest, logits.logsumexp(-1)
