"""`soft_em` in the C++ extension: all iterations in one call, but for "reseed"."""

from __future__ import annotations

import torch

from ..shared.bases import candidates_of, least_mass, reseeded
from ..shared.outputs import em_output
from . import contiguous_rows, enter


def soft_em_cuda(
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
    values = features if payload is None else payload
    flags = (payload is None, num_iters > 1, normalize, empty)
    enter("soft_em", features, values, bases.size(-2), flags)
    run = torch.ops.stem_kernels_ext.soft_em
    features = contiguous_rows(features)
    payload = None if payload is None else contiguous_rows(payload)
    bases = bases.float().contiguous()
    least = least_mass(features.shape[-2], bases.shape[-2])
    if empty == "reseed":
        # Each iteration but the last is a call of its own, and empty bases are put elsewhere.
        candidates = candidates_of(features, bases.shape[-2])
        for _ in range(num_iters - 1):
            bases, _, mass = run(features, bases, None, 1, temperature, normalize, False, least)
            bases = reseeded(bases, mass < least, candidates)
        num_iters = 1
    found: tuple[torch.Tensor, torch.Tensor, torch.Tensor]
    found = run(features, bases, payload, num_iters, temperature, normalize, empty != "zero", least)
    return found


torch.library.register_fake("stem_kernels_ext::soft_em")(em_output)
