"""`video_attention` in plain torch: the softmax over window, bases and text, row after row."""

from __future__ import annotations

import math

import torch

from ..shared.grid import Grid, by_frame, by_place, window_counts
from ..shared.outputs import attention_output, compute_dtype
from .chunks import groups
from .video_bases import damped_moments, group_means
from .window_attention import Rows, largest, near_logits, near_values


def video_attention_torch(
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
) -> torch.Tensor:
    """query, key [B, h, n, d], value [B, h, n, e], assignment int64 [B, h, n], text_key
    [B, h, T, d] and text_value [B, h, T, e] or None, text_mask bool [B, T] or None.

    Returns [B, n, h, e] of the query's dtype.
    """
    compute = compute_dtype(query)
    out = attention_output(query, key, value)
    by_head = out.transpose(1, 2)
    if text_key is None or text_value is None:
        text_key, text_value = key[:, :, :0], value[:, :, :0]
    with torch.autocast(query.device.type, enabled=False):
        for group in groups(query):
            queries, keys, values, texts, of_texts = (
                tensor[group].flatten(0, 1).to(compute)
                for tensor in (query, key, value, text_key, text_value)
            )
            bias = queries.new_zeros(texts.shape[:2])
            if text_mask is not None:
                masked = ~text_mask[group[0]]
                masked = masked.repeat_interleave(len(bias) // len(masked), 0)
                bias = bias.masked_fill(masked, float("-inf"))
            attended = _of_heads(
                queries,
                keys,
                values,
                assignment[group].flatten(0, 1),
                (texts, of_texts, bias),
                (grid[0], grid[1], grid[2]),
                window,
                num_bases,
                corrected,
                scale,
            )
            by_head[group] = attended.view_as(by_head[group]).to(out.dtype)
    return out


def _of_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    grid: Grid,
    window: int,
    num_bases: int,
    corrected: bool,
    scale: float,
) -> torch.Tensor:
    """[G, n, e] of heads [G, n, ...] and text [G, T, ...] with its bias [G, T].

    A base weighs M e^(q c) in the sum of the values and M - N of that in the sum of the weights.
    What the first has too much, e^(q c) v for each token of the window, is taken from the weights
    of the window's tokens, of which it is gathered: one product with the values for both.
    """
    frames, height, _ = grid
    rows = Rows(grid, window)
    base_key, base_value = group_means(assignment, num_bases, (key, value))
    matrix = None
    if corrected:
        matrix = damped_moments(query, key, value, assignment, base_key, base_value, scale)
        matrix = matrix * math.log(2)
    near, total = window_counts(assignment, grid, window, num_bases)
    mass = total.to(query.dtype)
    # Bases and text in one: keys [G, d, K + T], values [G, K + T, e], bias [G, 1, K + T].
    keys = torch.cat([base_key, text[0]], 1).mT
    values = torch.cat([base_value, text[1]], 1)
    bias = torch.cat([mass.log2(), text[2]], 1).unsqueeze(1)
    # [G, H, W, K + T, 2]: shares of their weights in all weights, and in those of the bases.
    rest = (total.unsqueeze(1) - near).to(query.dtype)  # exact; their shares are not, in float32
    rest = (rest / mass.unsqueeze(1).clamp(min=1)).unflatten(1, grid[1:])
    of_text = rest.new_ones((*rest.shape[:3], text[0].shape[1]))
    counted = torch.stack(
        [torch.cat([rest, of_text], -1), torch.cat([rest, torch.zeros_like(of_text)], -1)], -1
    )
    # Of each token: its base, and one over that base's tokens; 0 beyond the ends of a row.
    per_token = mass.clamp(min=1).reciprocal().gather(1, assignment)
    index, per_token = (rows.padded(t.unsqueeze(-1)) for t in (assignment, per_token))
    query = by_place(query * (scale / math.log(2)), grid).contiguous()
    key, value = rows.padded(key), rows.padded(value)
    found = []
    for row in range(height):
        seen, held, indices, inverses = (
            rows.windows(padded, row) for padded in (key, value, index, per_token)
        )
        outside = rows.outside(row, query)
        # [G, W, 1, keys]
        of_base, inverse = torch.cat(indices, -1), torch.cat(inverses, -1)
        for part in rows.parts(query.shape[0], rows.keys(row) + keys.shape[-1], query.device):
            queries = query[:, row, part]
            # [G, places, F, keys] and [G, places, F, K + T]
            exact = near_logits(queries, seen, outside, part)
            others = torch.baddbmm(bias, queries.flatten(1, 2), keys).unflatten(1, (-1, frames))
            peak = torch.maximum(largest(exact), largest(others))
            exact, others = exact.sub_(peak).exp2_(), others.sub_(peak).exp2_()
            weight, of_bases = (others @ counted[:, row, part]).split(1, -1)
            weight = weight + exact.sum(-1, keepdim=True)
            taken = others.gather(-1, of_base[:, part].expand(-1, -1, frames, -1))
            exact = exact.addcmul(taken, inverse[:, part], value=-1)
            attended = torch.bmm(others.flatten(1, 2), values).unflatten(1, (-1, frames))
            attended = (attended + near_values(exact, held, part)) / weight
            if matrix is not None:
                added = torch.bmm(queries.flatten(1, 2), matrix).view_as(attended)
                attended = attended.addcmul(of_bases / weight, added)
            found.append(attended)
    return by_frame(torch.cat(found, 1).unflatten(1, grid[1:]))
