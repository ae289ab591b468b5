"""R iterations of soft EM over tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..backends import select
from .checks import check_choice, check_count
from .em_statistics import check_em_inputs

OP = "soft_em"

EMPTY_POLICIES = ("zero", "mask", "reseed")


class SoftEM(NamedTuple):
    """Bases [..., K, D], payload bases [..., K, E] or None, mass [..., K]; float32 or float64.

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
    the same responsibilities that made the last bases (see `em_statistics`, `em_update`). Nothing
    waits for the device between iterations.

    A base is empty if its mass is below 0.01 * min(1, n / K), a hundredth of one token (or of an
    even share, where tokens are fewer than bases); some base always has more than that.

    Args:
        features: Tokens [B, n, D] or [B, h, n, D], n >= 1, any strides.
        bases: Initial bases [B, K, D] or [B, h, K, D] (see `initial_bases`).
        num_iters: Number R of iterations, at least 1. The paper has 5; from tokens (see
            `initial_bases`) 2 come as far.
        temperature: Temperature tau > 0 of the responsibilities.
        normalize: Whether the bases are scaled to unit length before the logits.
        payload: Values [B, n, E] or [B, h, n, E] of the features' dtype that ride along, or None.
        empty: Policy for empty bases. "zero": they fall to the zero vector, as in the
            authors' code. "mask": they keep their last value and report mass 0. "reseed": as
            "mask", but before each further iteration they are put on the tokens that the bases
            explain worst (largest part orthogonal to its nearest base, among 8 K tokens
            spread over all; deterministic).
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        SoftEM in float32 (float64 for float64 input).

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856; `empty="mask"` and `"reseed"` are this package's.
    """
    check_em_inputs(OP, features, bases, payload, temperature)
    check_choice(OP, "empty", empty, EMPTY_POLICIES)
    check_count(OP, "num_iters", num_iters)
    if features.shape[-2] == 0:
        raise ValueError(f"{OP}: features are {list(features.shape)}; there must be a token")
    tensors = {"features": features, "bases": bases, "payload": payload}
    chosen = select(OP, backend, tensors, bases.shape[-2])
    with_heads = features.ndim == 4
    if not with_heads:
        features, bases = features.unsqueeze(0), bases.unsqueeze(0)
        payload = None if payload is None else payload.unsqueeze(0)
    arguments = (features, bases, payload, num_iters, temperature, normalize, empty)
    if chosen == "triton":
        from ..triton.soft_em import soft_em_triton

        found = soft_em_triton(*arguments)
    elif chosen == "cuda":
        from ..cuda.soft_em import soft_em_cuda

        found = soft_em_cuda(*arguments)
    else:
        assert chosen == "torch"
        from ..reference.soft_em import soft_em_torch

        found = soft_em_torch(*arguments)
    bases, payload_bases, mass = found if with_heads else (part[0] for part in found)
    return SoftEM(bases, None if payload is None else payload_bases, mass)


def attention_bias(
    mass: torch.Tensor, *, empty: str = "mask", proportional: bool = False
) -> torch.Tensor | None:
    """What to add to the attention logits of bases with these masses.

    Args:
        mass: Mass [..., K] of a `SoftEM`.
        empty: Policy that it was made with. Empty bases get -inf, except under "zero".
        proportional: Whether log(mass) is added, so that a base standing for 5,000 tokens weighs
            as 5,000 keys would (dense attention is the limit K = n with this on).

    Returns:
        Floating [..., K], or None where nothing is to be added.

    Raises:
        ValueError: an unknown policy.
    """
    check_choice("attention_bias", "empty", empty, EMPTY_POLICIES)
    if proportional:
        return torch.log(mass)
    if empty == "zero":
        return None
    return torch.where(mass == 0, float("-inf"), 0.0)
