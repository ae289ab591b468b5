"""`blended_attention` in plain torch: `basis_attention_torch` twice, and a weighted sum."""

from __future__ import annotations

import torch

from ..shared.outputs import compute_dtype
from .basis_attention import basis_attention_torch


def blended_attention_torch(
    query_target: torch.Tensor,
    key_target: torch.Tensor,
    query_source: torch.Tensor,
    key_source: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query_* [B, h, n, d], key_* and value [B or 1, h, K, ...], mask [B, n], bias [.., .., K].

    Returns contiguous [B, n, h, e] of the query's dtype.
    """
    compute = compute_dtype(query_target)
    target = basis_attention_torch(query_target, key_target, value, bias, scale)
    source = basis_attention_torch(query_source, key_source, value, bias, scale)
    share = mask.detach().to(compute)[:, :, None, None]
    # What has no share may be NaN, and 0 times NaN would be NaN.
    target.masked_fill_(share == 0, 0.0)
    source.masked_fill_(share == 1, 0.0)
    return torch.lerp(source.to(compute), target.to(compute), share).to(target.dtype)
