"""What every backend makes of the keys of `nearest_token`: their lengths."""

from __future__ import annotations

import torch

SMALLEST_NORM = 1e-12  # a shorter key counts as so long, so that a key of zeros has the cosine 0


def inverse_norms(keys: torch.Tensor) -> torch.Tensor:
    """One over the length of each key [..., m, d]: [..., m], float32, or float64 for float64."""
    compute = torch.promote_types(keys.dtype, torch.float32)
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=compute)
    return norms.clamp(min=SMALLEST_NORM).reciprocal()
