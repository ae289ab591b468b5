"""Attention of video transformers against torch in float64, for some queries of two heads."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from ..shared.grid import Grid
from .comparison import ROWS, Comparison, Rounding, compared, finite, places, products, rounded

Cast = Callable[[torch.Tensor], torch.Tensor]


def window_attention(
    found: tuple[torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: list[int],
    window: int,
    scale: float,
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments as for `reference.window_attention`, `found` a backend's."""
    output, logsumexp = found
    if output.numel() == 0:
        return None
    leads, rows = _chosen(query, value.shape[-1])
    query, output, logsumexp = (
        part.flatten(0, 1)[leads][:, rows] for part in (query, output, logsumexp)
    )
    key, value = (part.flatten(0, 1)[leads] for part in (key, value))
    if not finite(query, key, value):
        return None
    near, dtype = _near(rows, (grid[0], grid[1], grid[2]), window), key.dtype

    def attended(cast: Cast) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = cast(query) @ cast(key).mT * scale
        seen = logits.masked_fill(~near, float("-inf"))
        weights = (seen - seen.amax(-1, keepdim=True)).exp()
        out = cast(weights) @ cast(value) / weights.sum(-1, keepdim=True)
        return out, seen.logsumexp(-1), logits

    exact = attended(torch.Tensor.double)
    plain = attended(lambda part: rounded(part, dtype))
    largest = float(plain[2].abs().max())
    listed = (
        compared("output", output, exact[0], plain[0], dtype, rounding, largest),
        compared("logsumexp", logsumexp, exact[1], plain[1], dtype, rounding, largest),
    )
    return [one for one in listed if one is not None]


def video_attention(
    out: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    text_key: torch.Tensor | None,
    text_value: torch.Tensor | None,
    text_mask: torch.Tensor | None,
    grid: list[int],
    window: int,
    num_bases: int,
    corrected: bool,
    scale: float,
    rounding: Rounding,
) -> list[Comparison] | None:
    """Arguments as for `reference.video_attention`, `out` [B, n, h, e] a backend's."""
    if out.numel() == 0:
        return None
    heads, dtype = query.shape[1], query.dtype
    leads, rows = _chosen(query, value.shape[-1])
    queries, keys, values, numbers = (
        part.flatten(0, 1)[leads] for part in (query, key, value, assignment)
    )
    result = out.transpose(1, 2).flatten(0, 1)[leads][:, rows]
    if text_key is None or text_value is None:
        texts, of_texts = keys[:, :0], values[:, :0]
    else:
        texts, of_texts = (part.flatten(0, 1)[leads] for part in (text_key, text_value))
    seen = torch.ones(texts.shape[:2], dtype=torch.bool, device=query.device)
    if text_mask is not None:
        seen = text_mask[leads // heads]
    if not finite(queries, keys, values, texts, of_texts):
        return None
    near = _near(rows, (grid[0], grid[1], grid[2]), window)
    largest = 0.0

    def attended(wide: Cast, cast: Cast) -> torch.Tensor:
        """[leads, rows, e] in the dtype that `wide` gives; operands of products are `cast`."""
        nonlocal largest
        member = torch.nn.functional.one_hot(numbers.long(), num_bases).to(wide(keys).dtype)
        mass = member.sum(1)
        share = (member / mass.clamp(min=1).unsqueeze(1)).mT
        base_keys, base_values = share @ wide(keys), share @ wide(values)
        base_key, base_value = cast(base_keys), cast(base_values)
        row = cast(queries[:, rows])
        # Tokens, bases and text; what tokens would have as those of their bases.
        logits = row @ torch.cat([cast(keys), base_key, cast(texts)], 1).mT * scale
        largest = float(logits.abs().max())
        exact, others = logits.split([keys.shape[1], logits.shape[-1] - keys.shape[1]], -1)
        exact = exact.masked_fill(~near, float("-inf"))
        # A base's mass, and nothing for text that is masked.
        bias = torch.cat([mass.log(), seen.to(mass.dtype).log()], 1).unsqueeze(1)
        peak = torch.maximum((others + bias).amax(-1), exact.amax(-1)).unsqueeze(-1)
        weights = (others + bias - peak).exp()
        index = numbers.long().unsqueeze(1).expand(-1, len(rows), -1)
        taken = (others - peak).exp().gather(-1, index).masked_fill(~near, 0.0)
        own = (exact - peak).exp() - taken
        total = weights.sum(-1, keepdim=True) + own.sum(-1, keepdim=True)
        attended = cast(weights) @ torch.cat([base_value, cast(of_texts)], 1)
        attended = (attended + cast(own) @ cast(values)) / total
        if corrected:
            left = (member @ base for base in (base_keys, base_values))
            of_keys, of_values = (
                wide(part) - base for part, base in zip((keys, values), left, strict=True)
            )
            of_queries = wide(queries).mT @ wide(queries) / keys.shape[1]
            spread = (of_queries * (of_keys.mT @ of_keys)).sum((1, 2), keepdim=True)
            factor = scale * (1 + spread * scale**2 / keys.shape[1]).rsqrt()
            matrix = cast(of_keys.mT @ of_values / keys.shape[1] * factor)
            of_bases = weights[..., :num_bases].sum(-1, keepdim=True)
            of_bases = of_bases - taken.sum(-1, keepdim=True)
            attended = attended + cast(row * (of_bases / total)) @ matrix
        return attended

    right = attended(torch.Tensor.double, torch.Tensor.double)
    plain = attended(torch.Tensor.float, lambda part: rounded(part, dtype))
    one = compared("output", result, right, rounded(plain, dtype), dtype, rounding, largest)
    return one and [one]


def _chosen(query: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two leads, and some queries of each."""
    leads = places(math.prod(query.shape[:2]), 2, query.device)
    n, dim = query.shape[2:]
    rows = min(ROWS // 2, products(query.device) // (4 * n * (dim + width)))
    return leads, places(n, rows, query.device)


def _near(rows: torch.Tensor, grid: Grid, window: int) -> torch.Tensor:
    """[rows, n]: whether a token is in the window of a row's."""
    every = torch.arange(math.prod(grid), device=rows.device)
    _, height, width = grid
    down, across = (
        of_rows.unsqueeze(-1) - of_all
        for of_rows, of_all in (
            (rows // width % height, every // width % height),
            (rows % width, every % width),
        )
    )
    return down.square() + across.square() <= window * (window + 1)
