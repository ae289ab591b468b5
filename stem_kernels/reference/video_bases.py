"""Bases of a video's tokens in plain torch: means of their groups, and what those leave out."""

from __future__ import annotations

import torch

from ..shared.outputs import compute_dtype
from .chunks import groups, token_chunks


def group_means(
    assignment: torch.Tensor, num_bases: int, tensors: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """Means of tokens by their base; 0 where a base has none.

    The sums are added in the order of the tokens on a CPU, and elsewhere as products of matrices,
    because adding to places that repeat has no order on a GPU.

    Args:
        assignment: Number of each token's base, int64 [G, n].
        num_bases: Number K of bases.
        tensors: Tokens [G, n, d] each, in float32 or float64.

    Returns:
        [G, K, d] each.
    """
    heads, _ = assignment.shape
    if assignment.device.type == "cpu":
        of_head = torch.arange(heads, device=assignment.device).unsqueeze(-1) * num_bases
        index = (of_head + assignment).flatten()
        # Not bincount, whose size depends on values: graphs and fake tensors have none.
        counts = index.new_zeros(heads * num_bases).scatter_add(0, index, torch.ones_like(index))
        counts = counts.view(heads, num_bases, 1)
        sums = [
            tensor.new_zeros((heads * num_bases, tensor.shape[-1]))
            .index_add(0, index, tensor.flatten(0, 1))
            .unflatten(0, (heads, num_bases))
            for tensor in tensors
        ]
    else:
        number = torch.arange(num_bases, device=assignment.device).view(1, -1, 1)
        sums = [tensor.new_zeros((heads, num_bases, tensor.shape[-1])) for tensor in tensors]
        counts = tensors[0].new_zeros((heads, num_bases, 1))
        for part in token_chunks(tensors[0], num_bases):
            # [G, K, n of the chunk]
            member = (assignment[:, None, part] == number).to(tensors[0].dtype)
            counts = counts + member.sum(-1, keepdim=True)
            sums = [
                torch.baddbmm(total, member, tensor[:, part])
                for total, tensor in zip(sums, tensors, strict=True)
            ]
    return tuple(total / counts.clamp(min=1) for total in sums)


def group_moments(
    assignment: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    base_key: torch.Tensor,
    base_value: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Means over tokens of (k - c)^T (v - v_c), [G, d, e], and of (k - c)^T (k - c), [G, d, d].

    Args:
        assignment: Number of each token's base c, int64 [G, n].
        key: Keys [G, n, d] in float32 or float64.
        value: Values [G, n, e].
        base_key: Means [G, K, d] of the keys.
        base_value: Means [G, K, e] of the values.
    """
    num_bases, width = base_key.shape[1:]
    of_head = torch.arange(key.shape[0], device=key.device).unsqueeze(-1) * num_bases
    total = key.new_zeros((key.shape[0], width, value.shape[-1] + width))
    for part in token_chunks(key, 2 * (width + value.shape[-1])):
        index = (assignment[:, part] + of_head).flatten()
        of_keys, of_values = (
            tensor[:, part] - base.flatten(0, 1).index_select(0, index).view_as(tensor[:, part])
            for tensor, base in ((key, base_key), (value, base_value))
        )
        total = torch.baddbmm(total, of_keys.mT, torch.cat([of_values, of_keys], -1))
    of_both, of_keys = (total / key.shape[1]).split([value.shape[-1], width], -1)
    return of_both, of_keys


def damped_moments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    base_key: torch.Tensor,
    base_value: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The matrix [G, d, e] that queries times `scale` are corrected with.

    Args:
        query: Queries [G, n, d], as they are.
        key: Keys [G, n, d].
        value: Values [G, n, e].
        assignment: Number of each token's base, int64 [G, n].
        base_key: Means [G, K, d] of the keys.
        base_value: Means [G, K, e] of the values.
        scale: Factor of the logits.
    """
    matrix, spread = group_moments(assignment, key, value, base_key, base_value)
    # The mean square of what logits differ by from their base's, over queries and tokens.
    of_queries = query.mT @ query / query.shape[1]
    spread = (of_queries * spread).sum((1, 2), keepdim=True) * scale**2
    return matrix * (1 + spread).rsqrt()


def video_bases_torch(
    key: torch.Tensor, value: torch.Tensor, assignment: torch.Tensor, num_bases: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """key [B, h, n, d], value [B, h, n, e], assignment int64 [B, h, n].

    Returns the means [B, h, K, d] and [B, h, K, e] and the moments [B, h, d, e], in float32 or
    float64.
    """
    compute = compute_dtype(key)
    found = []
    with torch.autocast(key.device.type, enabled=False):
        for group in groups(key):
            keys, values = (part[group].flatten(0, 1).to(compute) for part in (key, value))
            numbers = assignment[group].flatten(0, 1)
            means = group_means(numbers, num_bases, (keys, values))
            found.append((*means, group_moments(numbers, keys, values, *means)[0]))
    base_key, base_value, matrix = (
        torch.cat(parts).unflatten(0, key.shape[:2]) for parts in zip(*found, strict=True)
    )
    return base_key, base_value, matrix
