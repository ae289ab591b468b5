"""What every backend makes of the keys of `nearest_token`: their lengths."""

from __future__ import annotations

import torch

SMALLEST_NORM = 1e-12  # a shorter key counts as so long, so that a key of zeros has the cosine 0


def inverse_norms(keys: torch.Tensor) -> torch.Tensor:
    """One over the length of each key [..., m, d]: [..., m], float32, or float64 for float64."""
    compute = torch.promote_types(keys.dtype, torch.float32)
    norms = torch.linalg.vector_norm(keys, dim=-1, dtype=compute)
    return norms.clamp(min=SMALLEST_NORM).reciprocal()


def cosine_loss(query: torch.Tensor, keys: torch.Tensor, found: torch.Tensor) -> float:
    """How much smaller than the largest cosine that of a found key is, at most; in float64.

    Near ties may go either way, so this is what numbers of keys are judged by; inf where one is
    out of range.
    """
    if query.numel() == 0:
        return 0.0
    if bool((found < 0).any()) or bool((found >= keys.shape[-2]).any()):
        return float("inf")
    cosines = torch.nn.functional.normalize(query.double(), dim=-1)
    cosines = cosines @ torch.nn.functional.normalize(keys.double(), dim=-1).mT
    chosen = cosines.gather(-1, found.long().unsqueeze(-1)).squeeze(-1)
    return float((cosines.amax(-1) - chosen).max())
