"""R iterations of soft EM over tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..reference.em_statistics import directions_of
from .checks import check_choice
from .em_statistics import check_em_inputs, em_statistics

OP = "soft_em"

MASS_EPS = 1e-4
EMPTY_FRACTION = 0.01
EMPTY_POLICIES = ("zero", "mask", "reseed")
_CANDIDATES_PER_BASE = 8


class SoftEM(NamedTuple):
    """Converged bases [..., K, D], payload bases [..., K, E] or None, mass [..., K]; float32.

    Unless `empty="zero"`, the mass of an empty base is exactly 0.
    """

    bases: torch.Tensor
    payload: torch.Tensor | None
    mass: torch.Tensor


def soft_em(
    features: torch.Tensor,
    bases: torch.Tensor,
    *,
    num_iters: int = 5,
    temperature: float = 0.01,
    normalize: bool = True,
    payload: torch.Tensor | None = None,
    empty: str = "mask",
    backend: str = "auto",
) -> SoftEM:
    r"""Soft EM from given bases: `num_iters` times ST-E then ST-M.

    $$m_k \leftarrow \text{sums}_k / (\text{mass}_k + 10^{-4})$$

    and after the last iteration $v_k = \text{payload\_sums}_k / (\text{mass}_k + 10^{-4})$ with
    the same responsibilities that made the last bases (see `em_statistics`). Nothing waits for
    the device between iterations.

    A base is empty if its mass is below 0.01 * min(1, n / K), a hundredth of one token (or of an
    even share, where tokens are fewer than bases); some base always has more than that.

    Args:
        features: tokens [B, n, D] or [B, h, n, D], n >= 1, any strides.
        bases: initial bases [B, K, D] or [B, h, K, D] (see `initial_bases`).
        num_iters: R >= 1.
        temperature: tau > 0.
        normalize: scale the bases to unit length before the logits.
        payload: [B, n, E] or [B, h, n, E]; values that ride along, as the tokens' values do.
        empty: what becomes of empty bases. "zero": they fall to the zero vector, as in the
            authors' code. "mask": they keep their last value and report mass 0. "reseed": as
            "mask", but before each further iteration they are put on the tokens that the bases
            explain worst (largest part orthogonal to its nearest base, among 8 K tokens at an
            even stride; deterministic).
        backend: "auto", "triton", "cuda" or "torch".

    Returns:
        SoftEM in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856; `empty="mask"` and `"reseed"` are this package's.
    """
    check_em_inputs(OP, features, bases, payload, temperature)
    check_choice(OP, "empty", empty, EMPTY_POLICIES)
    if num_iters < 1:
        raise ValueError(f"{OP}: num_iters is {num_iters}; it must be at least 1")
    num_tokens, num_bases = features.shape[-2], bases.shape[-2]
    if num_tokens == 0:
        raise ValueError(f"{OP}: features are {list(features.shape)}; there must be a token")
    least_mass = EMPTY_FRACTION * min(1.0, num_tokens / num_bases)
    bases = bases.to(torch.promote_types(features.dtype, torch.float32))
    for iteration in range(num_iters):
        last = iteration == num_iters - 1
        statistics = em_statistics(
            features,
            bases,
            temperature=temperature,
            normalize=normalize,
            payload=payload if last else None,
            backend=backend,
        )
        mass = statistics.mass
        share = (mass + MASS_EPS).unsqueeze(-1)
        updated = statistics.sums / share
        if empty == "zero":
            bases = updated
            continue
        is_empty = mass < least_mass
        mass = torch.where(is_empty, 0.0, mass)
        kept = bases
        if empty == "reseed" and not last:
            kept = _worst_explained(features, updated, is_empty)
        bases = torch.where(is_empty.unsqueeze(-1), kept, updated)
    payload_sums = statistics.payload_sums
    return SoftEM(bases, None if payload_sums is None else payload_sums / share, mass)


def _worst_explained(
    features: torch.Tensor, bases: torch.Tensor, is_empty: torch.Tensor
) -> torch.Tensor:
    """For the r-th empty base, the r-th worst explained candidate token. [..., K, D]."""
    num_bases = bases.shape[-2]
    index = even_stride(features.shape[-2], _CANDIDATES_PER_BASE * num_bases, features.device)
    tokens = features.index_select(-2, index).to(bases.dtype)
    with torch.autocast(features.device.type, enabled=False):
        along = torch.matmul(tokens, directions_of(bases, normalize=True).mT)
    along = along.masked_fill(is_empty.unsqueeze(-2), float("-inf")).amax(-1)
    residual = tokens.square().sum(-1) - along.clamp(min=0.0).square()
    worst_first = residual.argsort(dim=-1, descending=True, stable=True)
    rank = (is_empty.cumsum(-1) - 1).clamp(min=0) % index.shape[0]
    chosen = worst_first.gather(-1, rank)
    return tokens.gather(-2, chosen.unsqueeze(-1).expand(*chosen.shape, tokens.shape[-1]))


def even_stride(num_tokens: int, count: int, device: torch.device) -> torch.Tensor:
    """min(count, num_tokens) token indices, int64, evenly spread over 0 ... num_tokens - 1."""
    count = min(count, num_tokens)
    return torch.arange(count, device=device) * num_tokens // count


def attention_bias(
    mass: torch.Tensor, *, empty: str = "mask", proportional: bool = False
) -> torch.Tensor | None:
    """What to add to the attention logits of bases with these masses.

    Args:
        mass: [..., K] of a `SoftEM`.
        empty: the policy it was made with. Empty bases get -inf, except under "zero".
        proportional: add log(mass), so that a base standing for 5,000 tokens weighs as 5,000
            keys would (dense attention is the limit K = n with this on).

    Returns:
        float32 [..., K], or None where nothing is to be added.
    """
    check_choice("attention_bias", "empty", empty, EMPTY_POLICIES)
    if proportional:
        return torch.log(mass)
    if empty == "zero":
        return None
    return torch.where(mass == 0, float("-inf"), 0.0)
