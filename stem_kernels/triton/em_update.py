"""The end of an EM iteration in one kernel: partial sums to bases, and bases to directions.

Adds up the parts in a fixed order, divides, keeps what an empty base was, and normalises for the
next iteration. Reads S K D floats; a launch of its own is what it costs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..shared.bases import MASS_EPS, NORM_EPS
from ..tuning import tile_for
from . import on_device_of

PART_ELEMENTS = 4096  # of a tile of parts


@triton.jit
def _update_kernel(
    p_sums, p_part_mass, p_old, p_bases, p_directions, p_mass,
    PARTS, MASS_PARTS, ROWS, D, least_mass, mass_eps, norm_eps,
    BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr, KEEP_EMPTY: tl.constexpr,
    NORMALIZE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    o_s = tl.arange(0, BLOCK_S)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    # [BLOCK_D]
    b_sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for s in range(0, PARTS, BLOCK_S):
        rows = (s + o_s).to(tl.int64) * ROWS + row
        # [BLOCK_S, BLOCK_D]
        b_part = tl.load(
            p_sums + (rows * D)[:, None] + o_d[None, :],
            mask=(s + o_s < PARTS)[:, None] & m_d[None, :], other=0.0,
        )  # fmt: skip
        b_sums += tl.sum(b_part, axis=0)
    b_masses = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for s in range(0, MASS_PARTS, BLOCK_S):
        rows = (s + o_s).to(tl.int64) * ROWS + row
        b_masses += tl.load(p_part_mass + rows, mask=s + o_s < MASS_PARTS, other=0.0)
    mass = tl.sum(b_masses, axis=0)
    b_bases = b_sums / (mass + mass_eps)
    if KEEP_EMPTY:
        is_empty = mass < least_mass
        b_old = tl.load(p_old + row * D + o_d, mask=m_d, other=0.0)
        b_bases = tl.where(is_empty, b_old, b_bases)
        mass = tl.where(is_empty, 0.0, mass)
    tl.store(p_bases + row * D + o_d, b_bases, mask=m_d)
    tl.store(p_mass + row, mass)
    if NORMALIZE:
        b_bases = b_bases / (tl.sqrt(tl.sum(b_bases * b_bases, axis=0)) + norm_eps)
    tl.store(p_directions + row * D + o_d, b_bases.to(p_directions.dtype.element_ty), mask=m_d)


def update(
    sums: torch.Tensor,
    mass: torch.Tensor,
    old: torch.Tensor,
    least_mass: float,
    *,
    keep_empty: bool,
    normalize: bool,
    dtype: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """New bases [B, h, K, D] and mass [B, h, K] in float32, and directions in `dtype`.

    Args:
        sums: Parts of the sums, [S, B, h, K, D] float32, contiguous.
        mass: Parts of the mass, [T, B, h, K] float32.
        old: Bases before, float32 [B, h, K, D], contiguous.
        least_mass: Mass below which a base is empty.
        keep_empty: Whether empty bases get their old value and the mass 0.
        normalize: Whether the directions are the bases divided by their length.
        dtype: Dtype of the directions, which is the features'.
    """
    dim = old.shape[-1]
    rows = old.shape[:-1].numel()
    bases, directions = torch.empty_like(old), torch.empty_like(old, dtype=dtype)
    total = old.new_empty(old.shape[:-1])
    block_d = tile_for(dim, 1 << 30)
    with on_device_of(old):
        _update_kernel[(rows,)](
            sums, mass.contiguous(), old, bases, directions, total,
            sums.shape[0], mass.shape[0], rows, dim, least_mass, MASS_EPS, NORM_EPS,
            BLOCK_S=max(1, PART_ELEMENTS // block_d), BLOCK_D=block_d, KEEP_EMPTY=keep_empty,
            NORMALIZE=normalize, num_warps=4,
        )  # fmt: skip
    return bases, total, directions
