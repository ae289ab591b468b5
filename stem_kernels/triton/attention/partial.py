"""`partial_attention` in Triton: a few queries, the keys split over the chip.

A program has a tile of queries and one range of keys; what is found of the ranges a second kernel
adds up, a query a program, in an order that the shapes decide. In half precision weights are
rounded to the input's dtype before they meet the values, as in `basis_attention`; sums are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...shared.outputs import partial_output
from ..em.update import block_of_parts, block_of_rows
from ..precision import dot_options
from ..program import Layout, Program, programs
from ..registration import operator
from ..tiles import aligned, in_eights
from ..tuning import rows_for, sum_ranges, tile_for, tiles
from .basis import LARGEST_HEAD


@triton.jit
def _partial_attention_kernel(
    p_query, p_key, p_value, p_sums, p_mass, p_largest,
    m, n, D, E, H, tokens_per_split,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, scale,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    D, E = in_eights(D, ALIGNED), in_eights(E, ALIGNED)
    stride_qb, stride_qh = in_eights(stride_qb, ALIGNED), in_eights(stride_qh, ALIGNED)
    stride_kb, stride_kh = in_eights(stride_kb, ALIGNED), in_eights(stride_kh, ALIGNED)
    stride_vb, stride_vh = in_eights(stride_vb, ALIGNED), in_eights(stride_vh, ALIGNED)
    stride_qn, stride_kn = in_eights(stride_qn, ALIGNED), in_eights(stride_kn, ALIGNED)
    stride_vn = in_eights(stride_vn, ALIGNED)
    tiles = tl.cdiv(m, BLOCK_M)
    lead = tl.program_id(0) // tiles
    leads = tl.num_programs(0) // tiles
    batch = (lead // H).to(tl.int64)
    head = (lead % H).to(tl.int64)
    p_key += batch * stride_kb + head * stride_kh
    p_value += batch * stride_vb + head * stride_vh
    o_m = tl.program_id(0) % tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    o_d = tl.arange(0, BLOCK_D).to(tl.int64)
    o_e = tl.arange(0, BLOCK_E).to(tl.int64)
    m_m = o_m < m
    m_d = o_d < D
    m_e = o_e < E
    # [BLOCK_M, BLOCK_D]
    b_q = tl.load(
        p_query + batch * stride_qb + head * stride_qh
        + (o_m.to(tl.int64) * stride_qn)[:, None] + (o_d * stride_qd)[None, :],
        mask=m_m[:, None] & m_d[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        b_q = b_q.to(tl.float32)
    # [BLOCK_M]
    b_largest = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    b_mass = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # [BLOCK_M, BLOCK_E]
    b_sums = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    begin = tl.program_id(1) * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, n)
    for start in range(begin, end, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N).to(tl.int64)
        m_n = o_n < end
        # [BLOCK_D, BLOCK_N]
        b_k = tl.load(
            p_key + (o_n * stride_kn)[None, :] + (o_d * stride_kd)[:, None],
            mask=m_n[None, :] & m_d[:, None], other=0.0,
        )  # fmt: skip
        if UPCAST:
            b_k = b_k.to(tl.float32)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, b_k, input_precision=PRECISION) * scale
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_largest, tl.max(b_s, axis=1))
        # -inf - -inf is NaN, and a later key may have a logit that is not -inf.
        b_shift = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_w = tl.exp2(b_s - b_shift[:, None])
        b_rescale = tl.exp2(b_largest - b_shift)
        b_mass = b_mass * b_rescale + tl.sum(b_w, axis=1)
        # [BLOCK_N, BLOCK_E]
        b_v = tl.load(
            p_value + (o_n * stride_vn)[:, None] + (o_e * stride_vd)[None, :],
            mask=m_n[:, None] & m_e[None, :], other=0.0,
        )  # fmt: skip
        b_w = b_w.to(b_v.dtype)
        if UPCAST:
            b_w, b_v = b_w.to(tl.float32), b_v.to(tl.float32)
        b_sums = tl.dot(b_w, b_v, b_sums * b_rescale[:, None], input_precision=PRECISION)
        b_largest = b_new
    o_row = (tl.program_id(1) * leads + lead).to(tl.int64) * m + o_m
    tl.store(p_largest + o_row, b_largest, mask=m_m)
    tl.store(p_mass + o_row, b_mass, mask=m_m)
    tl.store(p_sums + (o_row * E)[:, None] + o_e[None, :], b_sums, mask=m_m[:, None] & m_e[None, :])


@triton.jit
def _merge_kernel(
    p_sums, p_mass, p_largest, p_out, p_logsumexp,
    SPLITS, ROWS, E, ln_2,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, EIGHTS: tl.constexpr,
):  # fmt: skip
    E = in_eights(E, EIGHTS)
    # [BLOCK_R], [BLOCK_S], [BLOCK_E]
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_s = tl.arange(0, BLOCK_S)
    o_e = tl.arange(0, BLOCK_E)
    m_r = o_r < ROWS
    m = m_r[:, None] & (o_e < E)[None, :]
    o_value = (o_r * E)[:, None] + o_e[None, :]
    # [BLOCK_R, BLOCK_S]
    b_largest = tl.full((BLOCK_R, BLOCK_S), float("-inf"), dtype=tl.float32)
    for s in range(0, SPLITS, BLOCK_S):
        o_part = (s + o_s).to(tl.int64) * ROWS
        m_s = m_r[:, None] & (s + o_s < SPLITS)[None, :]
        p_part = p_largest + o_r[:, None] + o_part[None, :]
        b_largest = tl.maximum(b_largest, tl.load(p_part, mask=m_s, other=float("-inf")))
    # [BLOCK_R]
    b_peak = tl.max(b_largest, axis=1)
    b_shift = tl.where(b_peak == float("-inf"), 0.0, b_peak)
    # [BLOCK_R, BLOCK_S], [BLOCK_R, BLOCK_S, BLOCK_E]
    b_mass = tl.zeros((BLOCK_R, BLOCK_S), dtype=tl.float32)
    b_sums = tl.zeros((BLOCK_R, BLOCK_S, BLOCK_E), dtype=tl.float32)
    for s in range(0, SPLITS, BLOCK_S):
        o_part = (s + o_s).to(tl.int64) * ROWS
        m_s = m_r[:, None] & (s + o_s < SPLITS)[None, :]
        o_range = o_r[:, None] + o_part[None, :]
        b_part = tl.load(p_largest + o_range, mask=m_s, other=float("-inf"))
        b_share = tl.exp2(b_part - b_shift[:, None])
        b_mass += b_share * tl.load(p_mass + o_range, mask=m_s, other=0.0)
        b_sums += b_share[:, :, None] * tl.load(
            p_sums + o_value[:, None, :] + (o_part * E)[None, :, None],
            mask=m[:, None, :] & (s + o_s < SPLITS)[None, :, None], other=0.0,
        )  # fmt: skip
    # [BLOCK_R]
    b_total = tl.sum(b_mass, axis=1)
    tl.store(p_logsumexp + o_r, (b_peak + tl.log2(b_total)) * ln_2, mask=m_r)
    tl.store(p_out + o_value, tl.sum(b_sums, axis=1) / b_total[:, None], mask=m)


@programs
def _program(query: Layout, key: Layout, value: Layout, scale: float) -> tuple[Program, int, int]:
    """The program, and where the output and its logsumexp are."""
    batch, heads, num_queries, dim = query.shape
    n, width = value.shape[-2:]
    program = Program(query.device)
    inputs = [program.input(layout) for layout in (query, key, value)]
    block_d, block_e = tile_for(dim, LARGEST_HEAD), tile_for(width, LARGEST_HEAD)
    row_bytes = max(block_d, block_e) * query.element_size()
    options = tiles("partial_attention", query.device, query.dtype)
    block_m = tile_for(num_queries, rows_for(row_bytes, options.pop("query_bytes")))
    block_n = rows_for(row_bytes, options.pop("key_bytes"))
    tiled = batch * heads * triton.cdiv(num_queries, block_m)
    splits, tokens = sum_ranges(n, block_n, max(1, options.pop("programs") // tiled))
    lead = (batch, heads, num_queries)
    parts = (
        program.memory("sums", (splits, *lead, width), torch.float32),
        program.memory("mass", (splits, *lead), torch.float32),
        program.memory("largest", (splits, *lead), torch.float32),
    )
    program.launch(
        _partial_attention_kernel,
        (tiled, splits),
        (*inputs, *parts),
        (
            num_queries, n, dim, width, heads, tokens,
            *query.stride(), *key.stride(), *value.stride(), scale * math.log2(math.e),
        ),
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_D=block_d, BLOCK_E=block_e,
        ALIGNED=dim % 8 == width % 8 == 0 and aligned(query, key, value),
        **dot_options(query.dtype), **options,
    )  # fmt: skip
    out = program.memory("out", (*lead, width), torch.float32)
    logsumexp = program.memory("logsumexp", lead, torch.float32)
    rows = math.prod(lead)
    block_r = block_of_rows(rows)
    program.launch(
        _merge_kernel,
        (triton.cdiv(rows, block_r),),
        (*parts, out, logsumexp),
        (splits, rows, width, math.log(2)),
        BLOCK_R=block_r, BLOCK_S=block_of_parts(splits, block_r, block_e), BLOCK_E=block_e,
        EIGHTS=width % 8 == 0, num_warps=8,
    )  # fmt: skip
    return program, out.place, logsumexp.place


@operator
def partial_attention_triton(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """query [B, h, m, d], key [B, h, n, d], value [B, h, n, e], any strides.

    Returns the float32 output [B, h, m, e] and logsumexp [B, h, m].
    """
    if query.shape[2] == 0:
        return partial_output(query, key, value)
    program, out, logsumexp = _program(*map(Layout.of, (query, key, value)), scale)
    tensors = program(query, key, value)
    return tensors[out], tensors[logsumexp]


torch.library.register_fake("stem_kernels::partial_attention_triton")(partial_output)
