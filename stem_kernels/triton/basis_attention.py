"""`basis_attention` in Triton: queries against all bases; weights never leave the chip.

Narrow heads in half precision take `resident_attention`. All others, and chips for which its
tables have no row, take the kernel here, which goes through any number of bases in parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..tuning import rows_for, tile_for, tiles
from .precision import dot_options
from .program import Layout, Program, programs
from .registration import operator
from .resident_attention import options_of, resident_attention

LARGEST_HEAD = 512


@triton.jit
def attend(
    p_query, p_key, p_value, p_bias, o_n, m_n, K, D, E,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bk, scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WITH_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_E], float32: attention of queries o_n of a head, at which pointers point."""
    LOG2E: tl.constexpr = 1.4426950408889634
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E).to(tl.int64)
    m_d = o_d < D
    m_e = o_e < E
    # [BLOCK_N, BLOCK_D]
    b_q = tl.load(
        p_query + (o_n * stride_qn)[:, None] + (o_d * stride_qd)[None, :],
        mask=m_n[:, None] & m_d[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        b_q = b_q.to(tl.float32)
    # [BLOCK_N]
    b_max = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    # [BLOCK_N, BLOCK_E]
    b_out = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K).to(tl.int64)
        m_k = o_k < K
        # [BLOCK_D, BLOCK_K]
        b_k = tl.load(
            p_key + (o_k * stride_kn)[None, :] + (o_d * stride_kd)[:, None],
            mask=m_k[None, :] & m_d[:, None], other=0.0,
        )  # fmt: skip
        # [BLOCK_N, BLOCK_K]
        if UPCAST:
            b_k = b_k.to(tl.float32)
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        if WITH_BIAS:
            b_bias = tl.load(p_bias + o_k * stride_bk, mask=m_k, other=0.0).to(tl.float32)
            b_s += b_bias[None, :] * LOG2E
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_s, axis=1))
        # A tile whose bases are all excluded has the maximum -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_w = tl.exp2(b_s - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + tl.sum(b_w, axis=1)
        # [BLOCK_K, BLOCK_E]
        b_v = tl.load(
            p_value + (o_k * stride_vn)[:, None] + (o_e * stride_vd)[None, :],
            mask=m_k[:, None] & m_e[None, :], other=0.0,
        )  # fmt: skip
        b_w = b_w.to(b_v.dtype)
        if UPCAST:
            b_w, b_v = b_w.to(tl.float32), b_v.to(tl.float32)
        b_out = tl.dot(b_w, b_v, b_out * b_rescale[:, None], input_precision=PRECISION)
        b_max = b_new
    return b_out / b_sum[:, None]


@triton.jit
def _basis_attention_kernel(
    p_query, p_key, p_value, p_bias, p_out,
    n, K, D, E, H,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bk, scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WITH_BIAS: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # Only the first axis of a grid may exceed 65,535, so heads and tiles of tokens share it.
    tiles = tl.cdiv(n, BLOCK_N)
    lead = tl.program_id(0) // tiles
    batch = (lead // H).to(tl.int64)
    head = (lead % H).to(tl.int64)
    o_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    b_out = attend(
        p_query + batch * stride_qb + head * stride_qh,
        p_key + batch * stride_kb + head * stride_kh,
        p_value + batch * stride_vb + head * stride_vh,
        p_bias + batch * stride_bb + head * stride_bh,
        o_n, m_n, K, D, E,
        stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bk, scale,
        BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_E, WITH_BIAS, PRECISION, UPCAST,
    )  # fmt: skip
    o_e = tl.arange(0, BLOCK_E).to(tl.int64)
    tl.store(
        p_out + ((batch * n + o_n) * H * E + head * E)[:, None] + o_e[None, :],
        b_out.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_e < E)[None, :],
    )  # fmt: skip


@programs
def _program(
    query: Layout, key: Layout, value: Layout, bias: Layout | None, scale: float
) -> tuple[Program, int]:
    """The program, and where its output is."""
    batch, heads, n, dim = query.shape
    num_bases, width = value.shape[-2:]
    lead = (batch, heads, num_bases)
    key, value = key.expanded(*lead, dim), value.expanded(*lead, width)
    bias = None if bias is None else bias.expanded(*lead)
    program = Program(query.device)
    inputs = [program.input(layout) for layout in (query, key, value, bias) if layout is not None]
    out = program.memory("out", (batch, n, heads, width), query.dtype)
    options = options_of(query, key, value)
    if options:
        resident_attention(program, inputs, scale, out, options)
        return program, out.place
    block_d, block_e = tile_for(dim, LARGEST_HEAD), tile_for(width, LARGEST_HEAD)
    row_bytes = max(block_d, block_e) * query.element_size()
    options = tiles("basis_attention", query.device, query.dtype)
    block_n = rows_for(row_bytes, options.pop("query_bytes"))
    block_k = tile_for(num_bases, rows_for(row_bytes, options.pop("basis_bytes")))
    program.launch(
        _basis_attention_kernel,
        (triton.cdiv(n, block_n) * batch * heads,),
        (*inputs, out) if len(inputs) == 4 else (*inputs, inputs[0], out),
        (
            n, num_bases, dim, width, heads,
            *query.stride(), *key.stride(), *value.stride(),
            *((0, 0, 0) if bias is None else bias.stride()),
            scale * math.log2(math.e),
        ),
        BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, BLOCK_E=block_e,
        WITH_BIAS=bias is not None, **dot_options(query.dtype), **options,
    )  # fmt: skip
    return program, out.place


@operator
def basis_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query [B, h, n, d], key [B or 1, h, K, d], value [B or 1, h, K, e], bias [.., .., K].

    Returns contiguous [B, n, h, e] of the query's dtype.
    """
    if query.numel() == 0 or value.shape[-1] == 0:
        batch, heads, n, _ = query.shape
        return query.new_empty((batch, n, heads, value.shape[-1]))
    program, out = _program(
        Layout.of(query), Layout.of(key), Layout.of(value), Layout.of_any(bias), scale
    )
    return program(query, key, value, bias)[out]


@torch.library.register_fake("stem_kernels::basis_attention_triton")
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    batch, heads, n, _ = query.shape
    return query.new_empty((batch, n, heads, value.shape[-1]))
