"""`soft_em` in Triton: two launches an iteration, or three, and no wait for the device."""

from __future__ import annotations

import torch

from ..shared.bases import MASS_EPS, candidates_of, directions_of, least_mass, reseeded
from .em_statistics import em_pass
from .em_update import update


@torch.library.custom_op("stem_kernels::soft_em_triton", mutates_args=())
def soft_em_triton(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    num_iters: int,
    temperature: float,
    normalize: bool,
    empty: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """features [B, h, n, D], bases [B, h, K, D], payload [B, h, n, E] or None, any strides.

    Returns float32 bases, payload bases (E = 0 without a payload) and mass.
    """
    width = 0 if payload is None else payload.shape[-1]
    bases = bases.float().contiguous()
    directions = directions_of(bases, normalize).to(features.dtype)
    least = least_mass(features.shape[-2], bases.shape[-2])
    candidates = candidates_of(features, bases.shape[-2]) if empty == "reseed" else None
    for iteration in range(num_iters):
        last = iteration == num_iters - 1
        sums, part_mass, payload_sums = em_pass(
            features, directions, payload if last and width else None, temperature
        )
        reseed = candidates is not None and not last
        bases, mass, directions = update(
            sums,
            part_mass,
            bases,
            least,
            keep_empty=empty != "zero" and not reseed,
            normalize=normalize,
            dtype=features.dtype,
        )
        if candidates is not None and not last:
            bases = reseeded(bases, mass < least, candidates)
            directions = directions_of(bases, normalize).to(features.dtype)
    if payload_sums is None:
        return bases, bases.new_empty((*bases.shape[:-1], 0)), mass
    share = (part_mass.sum(0) + MASS_EPS).unsqueeze(-1)
    return bases, payload_sums.sum(0) / share, mass


@soft_em_triton.register_fake
def _(
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    num_iters: int,
    temperature: float,
    normalize: bool,
    empty: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    lead = bases.shape[:-1]
    return (
        features.new_empty(bases.shape, dtype=torch.float32),
        features.new_empty(
            (*lead, 0 if payload is None else payload.shape[-1]), dtype=torch.float32
        ),
        features.new_empty(lead, dtype=torch.float32),
    )
