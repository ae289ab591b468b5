"""`blended_attention` in the C++ extension."""

from __future__ import annotations

import torch

from ..shared.outputs import blended_output
from . import contiguous_rows, enter


def blended_attention_cuda(
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

    Returns contiguous [B, n, h, e] of the queries' dtype.
    """
    enter("blended_attention", query_target, value, value.size(-2), bias is None)
    lead = (*query_target.shape[:2], value.shape[-2])
    key_target, key_source, value = (
        contiguous_rows(bases).expand(*lead, bases.shape[-1])
        for bases in (key_target, key_source, value)
    )
    found: torch.Tensor = torch.ops.stem_kernels_ext.blended_attention(
        contiguous_rows(query_target),
        key_target,
        contiguous_rows(query_source),
        key_source,
        value,
        contiguous_rows(mask.float()),
        None if bias is None else bias.float().expand(lead),
        scale,
    )
    return found


torch.library.register_fake("stem_kernels_ext::blended_attention")(blended_output)
