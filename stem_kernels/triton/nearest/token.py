"""`nearest_token` in Triton: tiles of keys pass by, and each query keeps the best so far; where
queries are few, the keys come in ranges, whose best are compared afterwards. Narrow tokens in half
precision take `narrow`.

Products are of the tensors as they are, and are scaled by one over the key's length afterwards:
keys rounded to 16 bits again would be other keys.

Per (query, key): 2 d FLOPs. Floor on an H100 at d = 320: the matrix units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ...shared.cosine import inverse_norms
from ...shared.outputs import nearest_output
from ..precision import dot_options
from ..program import Layout, Program, programs
from ..registration import operator
from ..tuning import tile_for, tiles, token_ranges
from .narrow import narrow_options, nearest_narrow

MERGED_ROWS = 256  # of a block that compares ranges


@triton.jit
def _nearest_token_kernel(
    p_query, p_keys, p_share, p_found, p_best,
    n, m, D, keys_per_range,
    stride_qb, stride_qn, stride_qd,
    stride_kb, stride_kn, stride_kd,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    RANGES: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Only the first axis of a grid may exceed 65,535, so batch and tiles of queries share it.
    tiles = tl.cdiv(n, BLOCK_N)
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    p_q = p_query + batch * stride_qb + (o_n * stride_qn)[:, None]
    # [BLOCK_N]
    b_best = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    b_found = tl.zeros((BLOCK_N,), dtype=tl.int32)
    begin, end = 0, m
    if RANGES:
        begin = tl.program_id(1) * keys_per_range
        end = tl.minimum(m, begin + keys_per_range)
    for first in range(begin, end, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < end
        p_k = p_keys + batch * stride_kb + (o_m.to(tl.int64) * stride_kn)[None, :]
        # [BLOCK_N, BLOCK_M]
        b_s = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
        for d in range(0, D, BLOCK_D):
            o_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
            m_d = o_d < D
            # [BLOCK_N, BLOCK_D]
            b_q = tl.load(
                p_q + (o_d * stride_qd)[None, :], mask=m_n[:, None] & m_d[None, :], other=0.0
            )
            # [BLOCK_D, BLOCK_M]
            b_k = tl.load(
                p_k + (o_d * stride_kd)[:, None], mask=m_d[:, None] & m_m[None, :], other=0.0
            )
            if UPCAST:
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            b_s = tl.dot(b_q, b_k, b_s, input_precision=PRECISION)
        # [BLOCK_M]
        b_share = tl.load(p_share + batch * m + o_m, mask=m_m, other=0.0)
        b_s = tl.where(m_m[None, :], b_s * b_share[None, :], float("-inf"))
        b_largest = tl.max(b_s, axis=1)
        b_index = tl.min(tl.where(b_s == b_largest[:, None], o_m[None, :], m), axis=1)
        # Not >=: of equal ones the first counts. Where a product is NaN, none equals the largest.
        m_better = (b_largest > b_best) & (b_index < m)
        b_found = tl.where(m_better, b_index, b_found)
        b_best = tl.where(m_better, b_largest, b_best)
    if RANGES:
        batch += tl.program_id(1).to(tl.int64) * (tl.num_programs(0) // tiles)
        tl.store(p_best + batch * n + o_n, b_best, mask=m_n)
    tl.store(p_found + batch * n + o_n, b_found, mask=m_n)


@triton.jit
def _nearest_merge_kernel(p_best, p_part, p_found, ROWS, RANGES, BLOCK_R: tl.constexpr):
    # [BLOCK_R]
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < ROWS
    b_best = tl.full((BLOCK_R,), float("-inf"), dtype=tl.float32)
    b_found = tl.zeros((BLOCK_R,), dtype=tl.int32)
    o_part = o_r
    for _ in range(0, RANGES):
        b_other = tl.load(p_best + o_part, mask=m_r, other=float("-inf"))
        b_index = tl.load(p_part + o_part, mask=m_r, other=0)
        # Not >=: earlier ranges have the first of equal ones.
        b_found = tl.where(b_other > b_best, b_index, b_found)
        b_best = tl.maximum(b_best, b_other)
        o_part += ROWS
    tl.store(p_found + o_r, b_found, mask=m_r)


@programs
def _program(query: Layout, keys: Layout, share: Layout) -> tuple[Program, int]:
    """The program, and where its output is."""
    batch, n, dim = query.shape
    num_keys = keys.shape[1]
    program = Program(query.device)
    inputs = [program.input(layout) for layout in (query, keys, share)]
    out = program.memory("out", (batch, n), torch.int32)
    narrow = narrow_options(query, keys)
    if narrow:
        nearest_narrow(program, inputs, out, narrow)
        return program, out.place
    options = tiles("nearest_token", query.device, query.dtype)
    block_n, block_m = options.pop("block_n"), tile_for(num_keys, options.pop("block_m"))
    block_d = tile_for(dim, options.pop("block_d"))
    tiled = triton.cdiv(n, block_n) * batch
    ranges, length = token_ranges(num_keys, block_m, options.pop("programs") // tiled)
    part = best = out
    if ranges > 1:
        part = program.memory("part", (ranges, batch, n), torch.int32)
        best = program.memory("best", (ranges, batch, n), torch.float32)
    program.launch(
        _nearest_token_kernel,
        (tiled, ranges),
        (*inputs, part, best),
        (n, num_keys, dim, length, *query.stride(), *keys.stride()),
        BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_D=block_d, RANGES=ranges > 1,
        **dot_options(query.dtype), **options,
    )  # fmt: skip
    if ranges > 1:
        program.launch(
            _nearest_merge_kernel,
            (triton.cdiv(batch * n, MERGED_ROWS),),
            (best, part, out),
            (batch * n, ranges),
            BLOCK_R=MERGED_ROWS, num_warps=4,
        )  # fmt: skip
    return program, out.place


@operator
def nearest_token_triton(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """query [B, n, d], keys [B, m, d], any strides -> int32 [B, n]."""
    if query.shape[:2].numel() == 0:
        return nearest_output(query)
    tensors = (query, keys, inverse_norms(keys))
    program, out = _program(*map(Layout.of, tensors))
    return program(*tensors)[out]


torch.library.register_fake("stem_kernels::nearest_token_triton")(nearest_output)
