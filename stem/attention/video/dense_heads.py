"""Heads that take exact attention, chosen by how far off it a few of their queries are."""

from __future__ import annotations

import torch
from torch.nn.functional import scaled_dot_product_attention

from stem_kernels.shared.spread import spread_tokens

from .family import Projected

SAMPLED_QUERIES = 64
"""Queries of each head that are compared with exact attention, spread over the video."""


def exact_attention(
    query: torch.Tensor, video: Projected, text: Projected | None, mask: torch.Tensor | None
) -> torch.Tensor:
    """Exact attention of queries [B, h, m, d] to all tokens of video and text: [B, h, m, e].

    Args:
        query: Queries.
        video: Keys and values [B, h, n, ...] of the video.
        text: Keys and values [B, h, T, ...] of the text, or None.
        mask: Mask [B, T] of the text's keys that count, bool, or None: all.
    """
    key, value, seen = video.key, video.value, None
    if text is not None:
        key, value = (torch.cat(pair, 2) for pair in zip(video[1:], text[1:], strict=True))
    if mask is not None:
        of_video = mask.new_ones((mask.shape[0], video.key.shape[2]))
        seen = torch.cat([of_video, mask], 1)[:, None, None]
    return scaled_dot_product_attention(query, key, value, attn_mask=seen)


def with_dense_heads(
    attended: torch.Tensor,
    video: Projected,
    text: Projected | None,
    mask: torch.Tensor | None,
    count: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Exact attention in the heads whose output is furthest off it.

    How far is the norm of the difference over SAMPLED_QUERIES of the queries, which is what the
    output projection adds up. Nothing waits for the device.

    Args:
        attended: What the heads gave, [B, h, n, e].
        video: Queries, keys and values [B, h, n, ...] that it was computed from.
        text: Those of the text, or None.
        mask: Mask [B, T] of the text's keys, or None.
        count: Number of heads, at least 1; more than there are count as all.

    Returns:
        [B, h, n, e] anew, and the numbers of the heads, int64 [B, count], ascending.
    """
    heads, tokens = attended.shape[1:3]
    places = spread_tokens(tokens, min(SAMPLED_QUERIES, tokens), attended.device)
    with torch.no_grad():
        exact = exact_attention(video.query.index_select(2, places), video, text, mask)
        off = (exact - attended.index_select(2, places)).float().square().sum((2, 3))
        chosen = off.topk(min(count, heads), dim=1).indices.sort(dim=1).values
    rows = torch.arange(chosen.shape[0], device=chosen.device).unsqueeze(1)
    of_video = Projected(*(part[rows, chosen] for part in video))
    of_text = None if text is None else Projected(*(part[rows, chosen] for part in text))
    dense = exact_attention(of_video.query, of_video, of_text, mask)
    return attended.index_put((rows, chosen), dense), chosen
