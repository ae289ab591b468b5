"""`nearest_token` of narrow tokens in half precision, among a few thousand keys.

A program holds whole rows of its queries, and for each query and column of a tile of keys the best
so far and its tile: one comparison a product, and one search along the columns at the end.

Per (query, key): 2 d FLOPs. Floor on an H100 at d = 128: the matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..precision import dot_options
from ..program import Buffer, Layout, Program
from ..tiles import aligned, in_eights, load_rows
from ..tuning import tile_for, tiles

LARGEST_WIDTH = 128
MOST_KEYS = 2**14
"""More are cut into ranges, see `nearest_token`."""


@triton.jit
def _nearest_narrow_kernel(
    p_query, p_keys, p_share, p_found,
    n, m, stride_qb, stride_qn, stride_qd, stride_kb, stride_kn, stride_kd,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qn = in_eights(stride_qb, ALIGNED), in_eights(stride_qn, ALIGNED)
    stride_kb, stride_kn = in_eights(stride_kb, ALIGNED), in_eights(stride_kn, ALIGNED)
    # Only the first axis of a grid may exceed 65,535, so batch and tiles of queries share it.
    tiles = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < n - start
    p_keys += batch * stride_kb
    p_share += batch * m
    # [BLOCK_N, BLOCK_D]
    b_q = load_rows(
        p_query + batch * stride_qb + start * stride_qn, o_n * stride_qn, m_n, stride_qd, D, 0,
        BLOCK_D, UPCAST,
    )  # fmt: skip
    # [BLOCK_N, BLOCK_M]
    b_best = tl.full((BLOCK_N, BLOCK_M), float("-inf"), dtype=tl.float32)
    b_found = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.int32)
    for first in tl.range(0, m, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < m
        # [BLOCK_M, BLOCK_D], [BLOCK_M]
        b_k = load_rows(p_keys, o_m * stride_kn, m_m, stride_kd, D, 0, BLOCK_D, UPCAST)
        b_share = tl.load(p_share + o_m, mask=m_m, other=0.0)
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * b_share[None, :]
        if not FULL:
            b_s = tl.where(m_m[None, :], b_s, float("-inf"))
        # Not >=: of equal ones the first counts. NaN is no better than any.
        m_better = b_s > b_best
        b_found = tl.where(m_better, first, b_found)
        b_best = tl.where(m_better, b_s, b_best)
    b_found += tl.arange(0, BLOCK_M)[None, :]
    b_largest = tl.max(b_best, axis=1)
    # Where no product is a number the first key is as good as any.
    m_best = (b_best == b_largest[:, None]) & (b_largest > float("-inf"))[:, None]
    b_index = tl.min(tl.where(m_best, b_found, m), axis=1)
    tl.store(p_found + batch * n + start + o_n, tl.where(b_index < m, b_index, 0), mask=m_n)


def narrow_options(query: Layout, keys: Layout) -> dict[str, int]:
    """Tiles and launch options; none where there is no such kernel for these."""
    num_keys, dim = keys.shape[1:]
    near = MOST_KEYS * keys.stride(1) + dim * keys.stride(2) < 2**31
    if dim > LARGEST_WIDTH or num_keys > MOST_KEYS or query.element_size() != 2 or not near:
        return {}
    return tiles("nearest_narrow", query.device)


def nearest_narrow(
    program: Program, inputs: list[Buffer], out: Buffer, options: dict[str, int]
) -> None:
    """Add the launch to a program.

    Args:
        program: Program.
        inputs: Queries [B, n, d], keys [B, m, d] and one over the keys' lengths [B, m].
        out: Numbers of the nearest keys, int32 [B, n].
        options: What `narrow_options` gave.
    """
    query, keys = (buffer.layout for buffer in inputs[:2])
    batch, n, dim = query.shape
    num_keys = keys.shape[1]
    block_n, block_m = options.pop("block_n"), tile_for(num_keys, options.pop("block_m"))
    program.launch(
        _nearest_narrow_kernel,
        (triton.cdiv(n, block_n) * batch,),
        (*inputs, out),
        (n, num_keys, *query.stride(), *keys.stride()),
        D=dim, BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_D=tile_for(dim, LARGEST_WIDTH),
        FULL=num_keys % block_m == 0, ALIGNED=aligned(query, keys),
        **dot_options(query.dtype), **options,
    )  # fmt: skip
