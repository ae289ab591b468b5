"""One ST-E + ST-M pass: the sums from which new bases are made."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..verification import em, run
from ..verification.comparison import Comparison
from .checks import check_floating, check_positive, check_same_dtype

OP = "em_statistics"

ROUNDING_ATOL = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""Part of the parity bound: the output's own rounding, relative to the largest |reference|."""


class EMStatistics(NamedTuple):
    """What one pass over the tokens accumulates; additive over tokens.

    `sums` [..., K, D], `mass` [..., K] and `payload_sums` [..., K, E] (None without a payload),
    all float32 (float64 for float64 input).
    """

    sums: torch.Tensor
    mass: torch.Tensor
    payload_sums: torch.Tensor | None


def em_statistics(
    features: torch.Tensor,
    bases: torch.Tensor,
    *,
    temperature: float = 0.01,
    normalize: bool = True,
    payload: torch.Tensor | None = None,
    backend: str = "auto",
) -> EMStatistics:
    r"""Soft assignment of tokens to bases, and the weighted sums of tokens (STEM, ST-E and ST-M).

    With $\hat m_k = m_k / (\lVert m_k \rVert_2 + 10^{-4})$ (or $m_k$ itself if not `normalize`):

    $$z_{nk} = \mathrm{softmax}_k(x_n \cdot \hat m_k / \tau), \quad
      \text{sums}_k = \sum_n z_{nk} x_n, \quad \text{mass}_k = \sum_n z_{nk}, \quad
      \text{payload\_sums}_k = \sum_n z_{nk} p_n$$

    This is equivalent to the following, but never holds the responsibilities `[..., n, K]`:

        directions = bases / (bases.norm(dim=-1, keepdim=True) + 1e-4)
        z = torch.softmax(features @ directions.mT / temperature, dim=-1)
        return z.mT @ features, z.sum(-2), z.mT @ payload

    The results are sums over tokens, so the results of chunks of tokens, or of several GPUs, can be
    added. Every backend adds in a fixed order, so that equal calls give equal bits.

    Args:
        features: Tokens [B, n, D] or [B, h, n, D], any strides; n may be 0. Not normalised.
        bases: Bases [B, K, D] or [B, h, K, D], any floating dtype.
        temperature: Temperature tau > 0 of the responsibilities.
        normalize: Whether the bases are scaled to unit length before the logits.
        payload: Values [B, n, E] or [B, h, n, E] of the features' dtype, summed with the same
            weights.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch".

    Returns:
        EMStatistics, accumulated in float32. Float32 input is multiplied in float32, or in TF32 if
        `torch.set_float32_matmul_precision` asks for that.

    Raises:
        ValueError, TypeError: shapes, dtypes or values do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856, the EM iteration of "A Video is Worth 256 Bases".
    """
    check_em_inputs(OP, features, bases, payload, temperature)

    def check(found: EMStatistics, chosen: str) -> list[Comparison] | None:
        def rerun(tokens: slice) -> EMStatistics:
            ridden = None if payload is None else payload[..., tokens, :]
            return _on(chosen, features[..., tokens, :], bases, ridden, temperature, normalize)

        return em.em_statistics(found, *arguments, rerun, ROUNDING_ATOL)

    arguments = (features, bases, payload, temperature, normalize)
    tensors = {"features": features, "bases": bases, "payload": payload}
    return run(OP, backend, tensors, bases.shape[-2], lambda chosen: _on(chosen, *arguments), check)


def _on(
    chosen: str,
    features: torch.Tensor,
    bases: torch.Tensor,
    payload: torch.Tensor | None,
    temperature: float,
    normalize: bool,
) -> EMStatistics:
    """The result of one backend."""
    if chosen == "triton":
        from ..triton.em.statistics import em_statistics_triton

        found = em_statistics_triton(features, bases, payload, temperature, normalize)
        sums, mass, payload_sums = found
        return EMStatistics(sums, mass, None if payload is None else payload_sums)
    with_heads = features.ndim == 4
    if not with_heads:
        features, bases = features.unsqueeze(0), bases.unsqueeze(0)
        payload = None if payload is None else payload.unsqueeze(0)
    arguments = (features, bases, payload, temperature, normalize)
    if chosen == "cuda":
        from ..cuda.em_statistics import em_statistics_cuda

        sums, mass, payload_sums = em_statistics_cuda(*arguments)
    else:
        assert chosen == "torch"
        from ..reference.em_statistics import em_statistics_torch

        sums, mass, payload_sums = em_statistics_torch(*arguments)
    if not with_heads:
        sums, mass, payload_sums = sums[0], mass[0], payload_sums[0]
    return EMStatistics(sums, mass, None if payload is None else payload_sums)


def check_em_inputs(
    op: str,
    features: torch.Tensor,
    bases: torch.Tensor | None,
    payload: torch.Tensor | None,
    temperature: float,
) -> None:
    """Raise the error that a caller of an EM operator should see, if any."""
    check_floating(op, features=features, bases=bases, payload=payload)
    check_same_dtype(op, features=features, payload=payload)
    check_positive(op, "temperature", temperature)
    if features.ndim not in (3, 4):
        raise ValueError(
            f"{op}: features must be [B, n, D] or [B, h, n, D], not {list(features.shape)}"
        )
    if bases is not None and (
        bases.ndim != features.ndim
        or bases.shape[:-2] != features.shape[:-2]
        or bases.shape[-1] != features.shape[-1]
    ):
        wanted = [*features.shape[:-2], "K", features.shape[-1]]
        raise ValueError(
            f"{op}: features are {list(features.shape)}, so bases must be "
            f"[{', '.join(map(str, wanted))}], not {list(bases.shape)}"
        )
    if bases is not None and 0 in bases.shape[-2:]:
        raise ValueError(f"{op}: bases are {list(bases.shape)}; K and D must be at least 1")
    if payload is not None and payload.shape[:-1] != features.shape[:-1]:
        raise ValueError(
            f"{op}: payload is {list(payload.shape)}; it must have the features' leading sizes "
            f"{list(features.shape[:-1])}"
        )
