"""`nearest_token` in Triton: tiles of keys pass by, and each query keeps the best so far.

Products are of the tensors as they are, and are scaled by one over the key's length afterwards:
keys rounded to 16 bits again would be other keys.

Per (query, key): 2 d FLOPs. Floor on an H100 at d = 320: the matrix units.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..shared.cosine import inverse_norms
from ..shared.outputs import nearest_output
from .precision import dot_options
from .program import Layout, Program, programs
from .registration import operator
from .tuning import tile_for, tiles


@triton.jit
def _nearest_token_kernel(
    p_query, p_keys, p_share, p_found,
    n, m, D,
    stride_qb, stride_qn, stride_qd,
    stride_kb, stride_kn, stride_kd,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
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
    for first in range(0, m, BLOCK_M):
        o_m = first + tl.arange(0, BLOCK_M)
        m_m = o_m < m
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
    tl.store(p_found + batch * n + o_n, b_found, mask=m_n)


@programs
def _program(query: Layout, keys: Layout, share: Layout) -> tuple[Program, int]:
    """The program, and where its output is."""
    batch, n, dim = query.shape
    num_keys = keys.shape[1]
    program = Program(query.device)
    inputs = [program.input(layout) for layout in (query, keys, share)]
    out = program.memory("out", (batch, n), torch.int32)
    options = tiles("nearest_token", query.device, query.dtype)
    block_n, block_m = options.pop("block_n"), tile_for(num_keys, options.pop("block_m"))
    block_d = tile_for(dim, options.pop("block_d"))
    program.launch(
        _nearest_token_kernel,
        (triton.cdiv(n, block_n) * batch,),
        (*inputs, out),
        (n, num_keys, dim, *query.stride(), *keys.stride()),
        BLOCK_N=block_n, BLOCK_M=block_m, BLOCK_D=block_d,
        **dot_options(query.dtype), **options,
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
