"""`blended_attention` in Triton: a tile of queries by both maps, then their sum.

A map in which no query of a tile has a share is left out, so a tile outside of a mask costs what
`basis_attention` does.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...shared.outputs import attention_output, blended_output
from ..precision import dot_options
from ..program import Layout, Program, programs
from ..registration import operator
from ..tiles import aligned, in_eights
from ..tuning import rows_for, tile_for, tiles
from .basis import LARGEST_HEAD, attend
from .resident import LEAST_SCALE


@triton.jit
def _blended_attention_kernel(
    p_query, p_key, p_query_source, p_key_source, p_value, p_mask, p_bias, p_out,
    n, K, H,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_rb, stride_rh, stride_rn, stride_rd,
    stride_lb, stride_lh, stride_ln, stride_ld,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_mb, stride_mn, stride_bb, stride_bh, stride_bk, scale,
    D: tl.constexpr, E: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WITH_BIAS: tl.constexpr, SCALED: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qh = in_eights(stride_qb, ALIGNED), in_eights(stride_qh, ALIGNED)
    stride_kb, stride_kh = in_eights(stride_kb, ALIGNED), in_eights(stride_kh, ALIGNED)
    stride_rb, stride_rh = in_eights(stride_rb, ALIGNED), in_eights(stride_rh, ALIGNED)
    stride_lb, stride_lh = in_eights(stride_lb, ALIGNED), in_eights(stride_lh, ALIGNED)
    stride_vb, stride_vh = in_eights(stride_vb, ALIGNED), in_eights(stride_vh, ALIGNED)
    stride_qn, stride_kn = in_eights(stride_qn, ALIGNED), in_eights(stride_kn, ALIGNED)
    stride_rn, stride_ln = in_eights(stride_rn, ALIGNED), in_eights(stride_ln, ALIGNED)
    stride_vn = in_eights(stride_vn, ALIGNED)
    # Only the first axis of a grid may exceed 65,535, so heads and tiles of tokens share it.
    tiles = tl.cdiv(n, BLOCK_N)
    lead = tl.program_id(0) // tiles
    batch = (lead // H).to(tl.int64)
    head = (lead % H).to(tl.int64)
    o_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_e = tl.arange(0, BLOCK_E).to(tl.int64)
    m_n = o_n < n
    p_v = p_value + batch * stride_vb + head * stride_vh
    p_b = p_bias + batch * stride_bb + head * stride_bh
    p_m = p_mask + batch * stride_mb + o_n * stride_mn
    # [BLOCK_N]: shares of the target and of the source, none for what is past the last query
    b_share = tl.load(p_m, mask=m_n, other=0.0)
    b_rest = 1.0 - tl.load(p_m, mask=m_n, other=1.0)
    # [BLOCK_N, BLOCK_E]
    b_out = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    if tl.max(b_share, axis=0) > 0.0:
        b_part = attend(
            p_query + batch * stride_qb + head * stride_qh,
            p_key + batch * stride_kb + head * stride_kh,
            p_v, p_b, o_n, m_n, K,
            stride_qn, stride_qd, stride_kn, stride_kd, stride_vn, stride_vd, stride_bk, scale,
            D, E, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_E, WITH_BIAS, SCALED, PRECISION, UPCAST,
        )  # fmt: skip
        # 0 times NaN would be NaN.
        b_out = tl.where((b_share == 0.0)[:, None], 0.0, b_share[:, None] * b_part)
    if tl.max(b_rest, axis=0) > 0.0:
        b_part = attend(
            p_query_source + batch * stride_rb + head * stride_rh,
            p_key_source + batch * stride_lb + head * stride_lh,
            p_v, p_b, o_n, m_n, K,
            stride_rn, stride_rd, stride_ln, stride_ld, stride_vn, stride_vd, stride_bk, scale,
            D, E, BLOCK_N, BLOCK_K, BLOCK_D, BLOCK_E, WITH_BIAS, SCALED, PRECISION, UPCAST,
        )  # fmt: skip
        b_out += tl.where((b_rest == 0.0)[:, None], 0.0, b_rest[:, None] * b_part)
    tl.store(
        p_out + (((batch * n + o_n) * H + head) * E)[:, None] + o_e[None, :],
        b_out.to(p_out.dtype.element_ty), mask=m_n[:, None] & (o_e < E)[None, :],
    )  # fmt: skip


@programs
def _program(
    query_target: Layout,
    key_target: Layout,
    query_source: Layout,
    key_source: Layout,
    value: Layout,
    mask: Layout,
    bias: Layout | None,
    scale: float,
) -> tuple[Program, int]:
    """The program, and where its output is."""
    batch, heads, n, dim = query_target.shape
    num_bases, width = value.shape[-2:]
    lead = (batch, heads, num_bases)
    key_target, key_source = (key.expanded(*lead, dim) for key in (key_target, key_source))
    value = value.expanded(*lead, width)
    bias = None if bias is None else bias.expanded(*lead)
    program = Program(query_target.device)
    layouts = (query_target, key_target, query_source, key_source, value, mask)
    inputs = [program.input(layout) for layout in layouts]
    # A bias that is absent points at the mask, and is not read.
    inputs.append(inputs[-1] if bias is None else program.input(bias))
    out = program.memory("out", (batch, n, heads, width), query_target.dtype)
    block_d, block_e = tile_for(dim, LARGEST_HEAD), tile_for(width, LARGEST_HEAD)
    row_bytes = max(block_d, block_e) * query_target.element_size()
    options = tiles("blended_attention", query_target.device, query_target.dtype)
    block_n = rows_for(row_bytes, options.pop("query_bytes"))
    block_k = tile_for(num_bases, rows_for(row_bytes, options.pop("basis_bytes")))
    program.launch(
        _blended_attention_kernel,
        (triton.cdiv(n, block_n) * batch * heads,),
        (*inputs, out),
        (
            n, num_bases, heads,
            *query_target.stride(), *key_target.stride(),
            *query_source.stride(), *key_source.stride(), *value.stride(), *mask.stride(),
            *((0, 0, 0) if bias is None else bias.stride()),
            scale * math.log2(math.e),
        ),
        D=dim, E=width, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, BLOCK_E=block_e,
        WITH_BIAS=bias is not None, SCALED=scale < LEAST_SCALE,
        ALIGNED=aligned(query_target, key_target, query_source, key_source, value),
        **dot_options(query_target.dtype), **options,
    )  # fmt: skip
    return program, out.place


@operator
def blended_attention_triton(
    query_target: torch.Tensor,
    key_target: torch.Tensor,
    query_source: torch.Tensor,
    key_source: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
) -> torch.Tensor:
    """query_* [B, h, n, d], key_* and value [B or 1, h, K, ...], mask [B, n], bias [.., .., K].

    Returns contiguous [B, n, h, e] of the queries' dtype.
    """
    if query_target.numel() == 0 or value.shape[-1] == 0:
        return attention_output(query_target, key_target, value)
    tensors = (query_target, key_target, query_source, key_source, value, mask.float())
    program, out = _program(*map(Layout.of, tensors), Layout.of_any(bias), scale)
    return program(*tensors, bias)[out]


torch.library.register_fake("stem_kernels::blended_attention_triton")(blended_output)
