"""`basis_attention` in the C++ extension."""

from __future__ import annotations

import torch

from ..shared.outputs import attention_output
from . import contiguous_rows, enter


def basis_attention_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query [B, h, n, d], key [B or 1, h, K, d], value [B or 1, h, K, e], bias [.., .., K].

    correction [B or 1, h, d + 1, e] and query_mean [B or 1, h, d], or None.

    Returns contiguous [B, n, h, e] of the query's dtype.
    """
    flags = (bias is None, correction is None)
    enter("basis_attention", query, value, key.size(-2), flags)
    lead = (*query.shape[:2], key.shape[-2])
    found: torch.Tensor = torch.ops.stem_kernels_ext.basis_attention(
        contiguous_rows(query),
        contiguous_rows(key).expand(*lead, key.shape[-1]),
        contiguous_rows(value).expand(*lead, value.shape[-1]),
        None if bias is None else bias.float().expand(lead),
        expanded_floats(correction, query.shape[0]),
        expanded_floats(query_mean, query.shape[0]),
        scale,
    )
    return found


def expanded_floats(tensor: torch.Tensor | None, batch: int) -> torch.Tensor | None:
    """`tensor` [B or 1, ...] as float32 [B, ...]."""
    if tensor is None:
        return None
    return contiguous_rows(tensor.float()).expand(batch, *tensor.shape[1:])


torch.library.register_fake("stem_kernels_ext::basis_attention")(attention_output)
