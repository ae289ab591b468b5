"""`basis_attention` in Triton: queries against all bases; weights never leave the chip.

Narrow heads in half precision take `resident`. All others, and chips for which its
tables have no row, take the kernel here, which goes through any number of bases in parts.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...shared.outputs import attention_output
from ..precision import dot_options
from ..program import Layout, Program, programs
from ..registration import operator
from ..tiles import aligned, in_eights, row_max, row_sum
from ..tuning import rows_for, tile_for, tiles
from .correction import corrected
from .resident import LEAST_SCALE, LOG2E, options_of, resident_attention

LARGEST_HEAD = 512


@triton.jit
def attend(
    p_query, p_key, p_value, p_bias, o_n, m_n, K,
    stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bk, scale,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WITH_BIAS: tl.constexpr, SCALED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[BLOCK_N, BLOCK_E], float32: attention of queries o_n of a head, at which pointers point."""
    # A positive factor is left for after the maximum; a bias is then wanted without it.
    factor = 1.0 if SCALED else scale
    bias_factor = LOG2E if SCALED else LOG2E / scale
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
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION)
        if SCALED:
            b_s = b_s * scale
        if WITH_BIAS:
            b_bias = tl.load(p_bias + o_k * stride_bk, mask=m_k, other=float("-inf"))
            b_s += (b_bias.to(tl.float32) * bias_factor)[None, :]
        else:
            b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, row_max(b_s) * factor)
        # A tile whose bases are all excluded has the maximum -inf, and -inf - -inf is NaN.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_w = tl.exp2(b_s * factor - b_shift[:, None])
        b_rescale = tl.exp2(b_max - b_shift)
        b_sum = b_sum * b_rescale + row_sum(b_w)
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
    return b_out * (1.0 / b_sum)[:, None]


@triton.jit
def _basis_attention_kernel(
    p_query, p_key, p_value, p_bias, p_matrix, p_mean, p_out,
    n, K, H,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bk, corrections, scale,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WITH_BIAS: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr, CORRECTED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qh = in_eights(stride_qb, ALIGNED), in_eights(stride_qh, ALIGNED)
    stride_kb, stride_kh = in_eights(stride_kb, ALIGNED), in_eights(stride_kh, ALIGNED)
    stride_vb, stride_vh = in_eights(stride_vb, ALIGNED), in_eights(stride_vh, ALIGNED)
    stride_qn, stride_kn = in_eights(stride_qn, ALIGNED), in_eights(stride_kn, ALIGNED)
    stride_vn = in_eights(stride_vn, ALIGNED)
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
        o_n, m_n, K,
        stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bk, scale,
        D, E, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_E, WITH_BIAS, SCALED, PRECISION, UPCAST,
    )  # fmt: skip
    if CORRECTED:
        place = (lead % corrections).to(tl.int64)
        b_out = corrected(
            b_out, p_query + batch * stride_qb + head * stride_qh, o_n * stride_qn, m_n, stride_qd,
            p_matrix + place * (D + 1) * E, p_mean + place * D, D, E,
            0, BLOCK_E, PRECISION, UPCAST,
        )  # fmt: skip
    o_e = tl.arange(0, BLOCK_E).to(tl.int64)
    tl.store(
        p_out + (((batch * n + o_n) * H + head) * E)[:, None] + o_e[None, :],
        b_out.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_e < E)[None, :],
    )  # fmt: skip


@programs
def _program(
    query: Layout,
    key: Layout,
    value: Layout,
    bias: Layout | None,
    correction: Layout | None,
    query_mean: Layout | None,
    scale: float,
) -> tuple[Program, int]:
    """The program, and where its output is; correction and query_mean are contiguous."""
    batch, heads, n, dim = query.shape
    num_bases, width = value.shape[-2:]
    lead = (batch, heads, num_bases)
    key, value = key.expanded(*lead, dim), value.expanded(*lead, width)
    bias = None if bias is None else bias.expanded(*lead)
    program = Program(query.device)
    first = program.input(query)
    # What is absent points at the queries, and is not read.
    others = (key, value, bias, correction, query_mean)
    inputs = [first, *(first if part is None else program.input(part) for part in others)]
    corrections = 0 if correction is None else correction.shape[0] * heads
    out = program.memory("out", (batch, n, heads, width), query.dtype)
    extra = "correction" if corrections > 0 else "" if bias is None else "bias"
    options = options_of(query, key, value, extra)
    if options:
        resident_attention(program, inputs, bias is not None, corrections, scale, out, options)
        return program, out.place
    block_d, block_e = tile_for(dim, LARGEST_HEAD), tile_for(width, LARGEST_HEAD)
    row_bytes = max(block_d, block_e) * query.element_size()
    op = "basis_attention correction" if corrections > 0 else "basis_attention"
    options = tiles(op, query.device, query.dtype)
    block_n = rows_for(row_bytes, options.pop("query_bytes"))
    block_k = tile_for(num_bases, rows_for(row_bytes, options.pop("basis_bytes")))
    program.launch(
        _basis_attention_kernel,
        (triton.cdiv(n, block_n) * batch * heads,),
        (*inputs, out),
        (
            n, num_bases, heads,
            *query.stride(), *key.stride(), *value.stride(),
            *((0, 0, 0) if bias is None else bias.stride()),
            corrections, scale * math.log2(math.e),
        ),
        D=dim, E=width, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, BLOCK_E=block_e,
        WITH_BIAS=bias is not None, SCALED=scale < LEAST_SCALE,
        ALIGNED=aligned(query, key, value), CORRECTED=corrections > 0,
        **dot_options(query.dtype), **options,
    )  # fmt: skip
    return program, out.place


@operator
def basis_attention_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor | None,
    correction: torch.Tensor | None,
    query_mean: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query [B, h, n, d], key [B or 1, h, K, d], value [B or 1, h, K, e], bias [.., .., K].

    correction [B or 1, h, d + 1, e] and query_mean [B or 1, h, d], or None.
    Returns contiguous [B, n, h, e] of the query's dtype.
    """
    if query.numel() == 0 or value.shape[-1] == 0:
        return attention_output(query, key, value)
    if correction is not None and query_mean is not None:
        lead = max(correction.shape[0], query_mean.shape[0])
        correction, query_mean = (
            part.float().expand(lead, *part.shape[1:]).contiguous()
            for part in (correction, query_mean)
        )
    tensors = (query, key, value, bias, correction, query_mean)
    program, out = _program(
        Layout.of(query), Layout.of(key), Layout.of(value), *map(Layout.of_any, tensors[3:]), scale
    )
    return program(*tensors)[out]


torch.library.register_fake("stem_kernels::basis_attention_triton")(attention_output)
