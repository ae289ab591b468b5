"""The end of an EM iteration: from sums over all tokens to new bases."""

from __future__ import annotations

import torch

from ..shared.bases import candidate_tokens, least_mass, m_step
from ..verification import em, run
from ..verification.comparison import Comparison
from .checks import check_choice, check_count, check_floating, check_same_dtype
from .em_statistics import ROUNDING_ATOL
from .soft_em import EMPTY_POLICIES, SoftEM

__all__ = ["candidate_tokens", "em_update"]

OP = "em_update"


def em_update(
    sums: torch.Tensor,
    mass: torch.Tensor,
    bases: torch.Tensor,
    *,
    num_tokens: int,
    empty: str = "mask",
    payload_sums: torch.Tensor | None = None,
    candidates: torch.Tensor | None = None,
    backend: str = "auto",
) -> SoftEM:
    r"""New bases from the sums of `em_statistics` (the M-step's division).

    $$m_k \leftarrow \text{sums}_k / (\text{mass}_k + 10^{-4}), \quad
      v_k = \text{payload\_sums}_k / (\text{mass}_k + 10^{-4})$$

    Empty bases follow their policy (see `soft_em`). If the tokens come in chunks, or lie on several
    devices, the following is `soft_em`, to rounding:

        for iteration in range(num_iters):
            parts = [em_statistics(chunk, bases) for chunk in chunks]
            sums, mass = sum(part.sums for part in parts), sum(part.mass for part in parts)
            bases = em_update(sums, mass, bases, num_tokens=n).bases

    Sums that are added in the same order give the same bits, whichever device a chunk was on. With
    one chunk and the torch backend the bits are those of `soft_em`.

    Args:
        sums: Sums [..., K, D] over all tokens, float32 or float64.
        mass: Mass [..., K] over all tokens, float32 or float64.
        bases: Bases [..., K, D] that the sums were made with, any floating dtype.
        num_tokens: Number n of all tokens, at least 1; it decides below which mass a base is
            empty (see `soft_em`).
        empty: Policy for empty bases, "zero", "mask" or "reseed". After the last iteration
            `soft_em` uses "mask" in place of "reseed", because no token has been assigned yet to a
            base that was just moved.
        payload_sums: Payload sums [..., K, E] of the same pass, or None.
        candidates: Tokens [..., m, D] for "reseed", m >= 1, any floating dtype; unused otherwise.
            `soft_em` takes those at `candidate_tokens(n, K, device)` (in this module).
        backend: Name of the backend, "auto", "triton", "cuda" or "torch". Triton has one kernel for
            it, which gives torch's bits. "reseed" and the extension use the torch backend.

    Returns:
        SoftEM of the sums' dtype: bases, payload bases and mass.

    Raises:
        ValueError, TypeError: shapes, dtypes or values do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: arXiv 2312.05856, ST-M; "mask" and "reseed" are this package's.
    """
    check_floating(
        OP, sums=sums, mass=mass, bases=bases, payload_sums=payload_sums, candidates=candidates
    )
    check_same_dtype(OP, sums=sums, mass=mass, payload_sums=payload_sums)
    check_choice(OP, "empty", empty, EMPTY_POLICIES)
    check_count(OP, "num_tokens", num_tokens)
    if sums.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{OP}: sums is {sums.dtype}, which many tokens overflow; add them up in float32"
        )
    if sums.ndim < 2 or bases.shape != sums.shape or mass.shape != sums.shape[:-1]:
        raise ValueError(
            f"{OP}: sums must be [..., K, D], mass [..., K], bases [..., K, D]; they are "
            f"{list(sums.shape)}, {list(mass.shape)}, {list(bases.shape)}"
        )
    if mass.shape[-1] == 0:
        raise ValueError(f"{OP}: sums are {list(sums.shape)}; K must be at least 1")
    if payload_sums is not None and payload_sums.shape[:-1] != mass.shape:
        raise ValueError(
            f"{OP}: payload_sums is {list(payload_sums.shape)}; it must be [..., K, E] with the "
            f"mass's sizes {list(mass.shape)}"
        )
    if empty == "reseed":
        if candidates is None:
            raise ValueError(f'{OP}: empty="reseed" needs the argument candidates')
        wanted = (*sums.shape[:-2], *candidates.shape[-2:-1], sums.shape[-1])
        if candidates.shape != wanted or candidates.shape[-2] == 0:
            raise ValueError(
                f"{OP}: sums are {list(sums.shape)}, so candidates must be "
                f"[{', '.join(map(str, (*sums.shape[:-2], 'm', sums.shape[-1])))}] with m >= 1, "
                f"not {list(candidates.shape)}"
            )
        candidates = candidates.to(sums.dtype)
    bases = bases.to(sums.dtype)
    tensors = {"sums": sums, "mass": mass, "bases": bases, "payload_sums": payload_sums}
    least = least_mass(num_tokens, sums.shape[-2])

    def on(chosen: str) -> SoftEM:
        if chosen == "triton" and empty != "reseed" and sums.numel() > 0:
            from ..triton.em.update import em_update_triton

            found = em_update_triton(sums, mass, bases, payload_sums, num_tokens, empty == "mask")
        else:
            values = sums[..., :0] if payload_sums is None else payload_sums
            found = m_step(sums, mass, values, bases, least, empty, candidates)
        return SoftEM(found[0], None if payload_sums is None else found[1], found[2])

    def check(found: SoftEM, _: str) -> list[Comparison] | None:
        return em.em_update(found, sums, mass, bases, payload_sums, least, empty, ROUNDING_ATOL)

    return run(OP, backend, tensors, None, on, check)
