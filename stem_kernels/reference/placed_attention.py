"""`placed_attention` in plain torch, chunked so that [n, K] never exists for all n."""

from __future__ import annotations

import math

import torch

from ..shared.outputs import partial_output
from .chunks import groups, token_chunks
from .window_attention import largest


def placed_attention_torch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    matrix: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, h, n, d], key [B, h, K, d], value [B, h, K, e], bias [B, h, P, K] or None, matrix
    [B, h, d, e] or None.

    Returns the output [B, h, n, e] and the logsumexp [B, h, n], in float32 or float64.
    """
    output, logsumexp = partial_output(query, key, value)
    compute = output.dtype
    with torch.autocast(query.device.type, enabled=False):
        for group in groups(query):
            queries, keys, values = (
                tensor[group].flatten(0, 1).to(compute) for tensor in (query, key, value)
            )
            shift, added = (
                None if tensor is None else tensor[group].flatten(0, 1).to(compute)
                for tensor in (bias, matrix)
            )
            found = _of_heads(queries, keys, values, shift, added, scale)
            for whole, part in zip((output, logsumexp), found, strict=True):
                whole[group] = part.view_as(whole[group])
    return output, logsumexp


def _of_heads(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    matrix: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of heads [G, n, ...] in float32 or float64: [G, n, e] and [G, n].

    With powers of two, of logits scaled for that: exp2 takes a third of exp's time on a CPU.
    """
    heads, num_bases, _ = key.shape
    places = 1 if bias is None else bias.shape[1]
    keys = key.mT * (scale / math.log(2))
    if bias is None:
        bias = keys.new_zeros((1, 1, 1))
    bias = bias * (1 / math.log(2))
    matrix = None if matrix is None else matrix * scale
    # [G, F, P, d]; one place has all tokens of its chunk.
    of_frames = query.unflatten(1, (-1, places)) if places > 1 else query.unsqueeze(1)
    outputs, logsumexps = [], []
    for frame in of_frames.unbind(1):
        for part in token_chunks(frame, num_bases):
            queries = frame[:, part]
            shift = bias[:, part] if places > 1 else bias
            logits = torch.baddbmm(shift, queries, keys)
            peak = largest(logits)
            peak = peak.masked_fill(peak == float("-inf"), 0.0)
            weights = logits.sub_(peak).exp2_()
            mass = weights.sum(-1, keepdim=True)
            attended = torch.bmm(weights, value) / mass
            if matrix is not None:
                attended = torch.baddbmm(attended, queries, matrix)
            outputs.append(attended)
            logsumexps.append((peak + mass.log2()) * math.log(2))
    if not outputs:
        return query.new_empty((heads, 0, value.shape[-1])), query.new_empty((heads, 0))
    return torch.cat(outputs, 1), torch.cat(logsumexps, 1).squeeze(-1)
