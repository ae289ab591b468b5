"""What every backend makes of bases: directions for the logits, the M-step, what is empty."""

from __future__ import annotations

import torch

from .spread import spread_tokens

NORM_EPS = 1e-4  # added to a base's length, and
MASS_EPS = 1e-4  # to its mass, before the division
EMPTY_FRACTION = 0.01
CANDIDATES_PER_BASE = 8


def directions_of(bases: torch.Tensor, normalize: bool) -> torch.Tensor:
    """The bases as the logits see them: m / (|m| + 1e-4), or m itself. Same shape and dtype."""
    if not normalize:
        return bases
    return bases / (torch.linalg.vector_norm(bases, dim=-1, keepdim=True) + NORM_EPS)


def least_mass(num_tokens: int, num_bases: int) -> float:
    """Below it a base is empty: a hundredth of a token, or of an even share if that is less."""
    return EMPTY_FRACTION * min(1.0, num_tokens / num_bases)


def m_step(
    sums: torch.Tensor,
    mass: torch.Tensor,
    payload_sums: torch.Tensor,
    bases: torch.Tensor,
    least: float,
    empty: str,
    candidates: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The end of an EM iteration.

    Args:
        sums: Sums [..., K, D].
        mass: Mass [..., K].
        payload_sums: Payload sums [..., K, E]; E may be 0.
        bases: Bases [..., K, D] that the sums were made with, of their dtype.
        least: Mass below which a base is empty.
        empty: Policy for empty bases, "zero", "mask" or "reseed".
        candidates: Tokens [..., m, D] among which "reseed" puts empty bases.

    Returns:
        New bases [..., K, D], payload bases [..., K, E] and mass [..., K]; under "mask" and
        "reseed" the mass of empty bases is 0.
    """
    share = (mass + MASS_EPS).unsqueeze(-1)
    updated, payload = sums / share, payload_sums / share
    if empty == "zero":
        return updated, payload, mass
    is_empty = mass < least
    mass = torch.where(is_empty, 0.0, mass)
    if empty == "reseed":
        assert candidates is not None
        return reseeded(updated, is_empty, candidates), payload, mass
    return torch.where(is_empty.unsqueeze(-1), bases, updated), payload, mass


def num_candidates(num_tokens: int, num_bases: int) -> int:
    """How many tokens there are among which "reseed" puts empty bases."""
    return min(num_tokens, CANDIDATES_PER_BASE * num_bases)


def candidate_tokens(num_tokens: int, num_bases: int, device: torch.device) -> torch.Tensor:
    """Indices [m] of the tokens among which "reseed" puts empty bases, spread over all tokens."""
    return spread_tokens(num_tokens, num_candidates(num_tokens, num_bases), device)


def candidates_of(features: torch.Tensor, num_bases: int) -> torch.Tensor:
    """The candidates [..., m, D] among all tokens [..., n, D]; float32 or float64."""
    index = candidate_tokens(features.shape[-2], num_bases, features.device)
    compute = torch.promote_types(features.dtype, torch.float32)
    return features.index_select(-2, index).to(compute)


def reseeded(bases: torch.Tensor, is_empty: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The bases [..., K, D], the r-th empty one put on the r-th worst explained candidate."""
    with torch.autocast(bases.device.type, enabled=False):
        along = torch.matmul(candidates, directions_of(bases, normalize=True).mT)
    along = along.masked_fill(is_empty.unsqueeze(-2), float("-inf")).amax(-1)
    residual = candidates.square().sum(-1) - along.clamp(min=0.0).square()
    worst_first = residual.argsort(dim=-1, descending=True, stable=True)
    rank = (is_empty.cumsum(-1) - 1).clamp(min=0) % candidates.shape[-2]
    chosen = worst_first.gather(-1, rank)
    seeds = candidates.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, bases.shape[-1]))
    return torch.where(is_empty.unsqueeze(-1), seeds, bases)
