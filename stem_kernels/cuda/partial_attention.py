"""`partial_attention` in the C++ extension."""

from __future__ import annotations

import torch

from ..shared.outputs import partial_output
from . import contiguous_rows, enter


def partial_attention_cuda(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, h, m, d], key [B, h, n, d], value [B, h, n, e], any strides.

    Returns the float32 output [B, h, m, e] and logsumexp [B, h, m].
    """
    enter("partial_attention", query, value, 0)
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.stem_kernels_ext.partial_attention(
        contiguous_rows(query), contiguous_rows(key), contiguous_rows(value), scale
    )
    return found


torch.library.register_fake("stem_kernels_ext::partial_attention")(partial_output)
