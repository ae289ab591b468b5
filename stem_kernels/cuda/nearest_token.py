"""`nearest_token` in the C++ extension."""

from __future__ import annotations

import torch

from ..shared.cosine import inverse_norms
from ..shared.outputs import nearest_output
from . import contiguous_rows, enter


def nearest_token_cuda(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query [B, n, d], keys [B, m, d], any strides -> int32 [B, n]."""
    enter("nearest_token", query, keys, 0)
    found: torch.Tensor = torch.ops.stem_kernels_ext.nearest_token(
        contiguous_rows(query).unsqueeze(1),
        contiguous_rows(keys).unsqueeze(1),
        inverse_norms(keys).unsqueeze(1).contiguous(),
    )
    return found.squeeze(1)


torch.library.register_fake("stem_kernels_ext::nearest_token")(nearest_output)
