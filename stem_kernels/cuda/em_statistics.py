"""`em_statistics` in the C++ extension."""

from __future__ import annotations

import torch

from ..shared.outputs import statistics_output
from . import contiguous_rows, enter


def em_statistics_cuda(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """features [B, h, n, D], bases [B, h, K, D], payload [B, h, n, E] or None, any strides.

    Returns float32 sums, mass and payload sums (E = 0 without a payload).
    """
    values = features if payload is None else payload
    flags = (payload is None, normalize)
    enter("em_statistics", features, values, bases.size(-2), flags)
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    found = torch.ops.stem_kernels_ext.em_statistics(
        contiguous_rows(features),
        bases.float().contiguous(),
        None if payload is None else contiguous_rows(payload),
        temperature,
        normalize,
    )
    return found


torch.library.register_fake("stem_kernels_ext::em_statistics")(statistics_output)
