"""`soft_em` in plain torch: `em_statistics_torch` and the division, time after time."""

from __future__ import annotations

import torch

from .em_statistics import directions_of, em_statistics_torch
from .spread import spread_tokens

MASS_EPS = 1e-4
EMPTY_FRACTION = 0.01
_CANDIDATES_PER_BASE = 8


def least_mass(num_tokens: int, num_bases: int) -> float:
    """Below it a base is empty: a hundredth of a token, or of an even share if that is less."""
    return EMPTY_FRACTION * min(1.0, num_tokens / num_bases)


def soft_em_torch(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    num_iters: int,
    temperature: float,
    normalize: bool,
    empty: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """features [B, h, n, D], bases [B, h, K, D], payload [B, h, n, E] or None.

    Returns bases, payload bases (E = 0 without a payload) and mass, in float32 or float64.
    """
    least = least_mass(features.shape[-2], bases.shape[-2])
    bases = bases.to(torch.promote_types(features.dtype, torch.float32))
    for iteration in range(num_iters):
        last = iteration == num_iters - 1
        sums, mass, payload_sums = em_statistics_torch(
            features, bases, payload if last else None, temperature, normalize
        )
        share = (mass + MASS_EPS).unsqueeze(-1)
        updated = sums / share
        if empty == "zero":
            bases = updated
            continue
        is_empty = mass < least
        mass = torch.where(is_empty, 0.0, mass)
        if empty == "reseed" and not last:
            bases = reseeded(features, updated, is_empty)
        else:
            bases = torch.where(is_empty.unsqueeze(-1), bases, updated)
    return bases, payload_sums / share, mass


def reseeded(features: torch.Tensor, bases: torch.Tensor, is_empty: torch.Tensor) -> torch.Tensor:
    """The bases [..., K, D], the r-th empty one put on the r-th worst explained candidate token."""
    num_tokens, num_bases = features.shape[-2], bases.shape[-2]
    candidates = min(num_tokens, _CANDIDATES_PER_BASE * num_bases)
    index = spread_tokens(num_tokens, candidates, features.device)
    tokens = features.index_select(-2, index).to(bases.dtype)
    with torch.autocast(features.device.type, enabled=False):
        along = torch.matmul(tokens, directions_of(bases, normalize=True).mT)
    along = along.masked_fill(is_empty.unsqueeze(-2), float("-inf")).amax(-1)
    residual = tokens.square().sum(-1) - along.clamp(min=0.0).square()
    worst_first = residual.argsort(dim=-1, descending=True, stable=True)
    rank = (is_empty.cumsum(-1) - 1).clamp(min=0) % index.shape[0]
    chosen = worst_first.gather(-1, rank)
    seeds = tokens.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, tokens.shape[-1]))
    return torch.where(is_empty.unsqueeze(-1), seeds, bases)
