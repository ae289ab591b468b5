"""`soft_em` in plain torch: `em_statistics_torch` and the M-step, time after time."""

from __future__ import annotations

import torch

from ..shared.bases import candidates_of, least_mass, m_step
from ..shared.outputs import compute_dtype
from .em_statistics import em_statistics_torch


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
    num_bases = bases.shape[-2]
    least = least_mass(features.shape[-2], num_bases)
    candidates = candidates_of(features, num_bases) if empty == "reseed" else None
    bases = bases.to(compute_dtype(features))
    for iteration in range(num_iters):
        last = iteration == num_iters - 1
        sums, mass, payload_sums = em_statistics_torch(
            features, bases, payload if last else None, temperature, normalize
        )
        policy = "mask" if empty == "reseed" and last else empty
        bases, payload_bases, mass = m_step(
            sums, mass, payload_sums, bases, least, policy, candidates
        )
    return bases, payload_bases, mass
