"""Attention to at most 256 bases of a head, which stay on the chip while queries pass by.

K and V of a head are read once per program, in one part or two, as the tables of tiles say. With
two, the second rescales what the first gave, one multiplication per output and 256 bases, and the
first one's weights need not be held until the last maximum is known. "ahead" in a table reads the
next queries while the weights of these are computed, and lets addresses be computed in the loop
again, which takes instructions for registers: on sm_90 three blocks then share a multiprocessor at
40 channels, and at 80 the queries' way from memory is hidden.

Per (query, base): 4 d FLOPs, one exp2. Floor on an H100 at d = 40: the exponentials.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import triton
import triton.language as tl

from ..precision import dot_options
from ..program import Buffer, Layout, Program
from ..tiles import (
    aligned,
    in_eights,
    load_rows,
    offsets_fit,
    reciprocal,
    row_max,
    row_sum,
    store_rows,
)
from ..tuning import tile_for, tiles, two_tiles
from .correction import corrected

LARGEST_BASES = 256
LOG2E = tl.constexpr(1.4426950408889634)
LEAST_SCALE = 2.0**-40  # below it a bias over the scale could leave float32's range
WIDTHS = (48, 64, 80, 160)  # each has its own row in the tables of tiles


@triton.jit
def _logits(
    b_q, b_q_rest, b_k, b_k_rest, p_bias, stride_bk, m_k, scale,
    D_REST: tl.constexpr, WITH_BIAS: tl.constexpr, SCALED: tl.constexpr, FULL: tl.constexpr,
    AHEAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [BLOCK_N, BLOCK_K]; in base 2, and without the scale unless SCALED
    b_s = tl.zeros((b_q.shape[0], b_k.shape[0]), dtype=tl.float32)
    if WITH_BIAS:
        # Held from tile to tile it would take a register per column and thread.
        o_k = tl.arange(0, b_k.shape[0])
        b_bias = tl.load(p_bias + o_k * stride_bk, mask=m_k, other=float("-inf")).to(tl.float32)
        b_bias = b_bias * (LOG2E if SCALED else LOG2E / scale)
        if not SCALED:
            # The products are added to it, so that it takes no addition per logit.
            b_s += b_bias[None, :]
    # Triton waits for each product. The short one first lets another block's long one come between,
    # and takes more registers.
    if D_REST > 0 and AHEAD:
        b_s = tl.dot(b_q_rest, tl.trans(b_k_rest), b_s, input_precision=PRECISION)
    b_s = tl.dot(b_q, tl.trans(b_k), b_s, input_precision=PRECISION)
    if D_REST > 0 and not AHEAD:
        b_s = tl.dot(b_q_rest, tl.trans(b_k_rest), b_s, input_precision=PRECISION)
    if SCALED:
        b_s = b_s * scale
        if WITH_BIAS:
            b_s += b_bias[None, :]
    if not WITH_BIAS and not FULL:
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    return b_s


@triton.jit
def _attend(
    b_s, b_v, b_v_rest, b_max, b_sum, b_out, b_out_rest, factor,
    E_REST: tl.constexpr, WITH_BIAS: tl.constexpr, FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    # [BLOCK_N]; a positive factor is left for after the maximum: one multiplication a row
    b_new = row_max(b_s) * factor
    if not FIRST:
        b_new = tl.maximum(b_new, b_max)
    # A part whose bases are all excluded has the maximum -inf, and -inf - -inf is NaN.
    b_shift = tl.where(b_new == float("-inf"), 0.0, b_new) if WITH_BIAS else b_new
    b_w = tl.exp2(b_s * factor - b_shift[:, None])
    b_total = row_sum(b_w)
    b_w = b_w.to(b_v.dtype)
    if FIRST:
        b_out = tl.dot(b_w, b_v, input_precision=PRECISION)
        if E_REST > 0:
            b_out_rest = tl.dot(b_w, b_v_rest, input_precision=PRECISION)
    else:
        b_rescale = tl.exp2(b_max - b_shift)
        b_total += b_sum * b_rescale
        b_out = tl.dot(b_w, b_v, b_out * b_rescale[:, None], input_precision=PRECISION)
        if E_REST > 0:
            b_out_rest = tl.dot(
                b_w, b_v_rest, b_out_rest * b_rescale[:, None], input_precision=PRECISION
            )
    return b_new, b_total, b_out, b_out_rest


@triton.jit
def _queries(
    p_q, start, o_row, n, stride_qn, stride_qd,
    D: tl.constexpr, D_MAIN: tl.constexpr, D_REST: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # [BLOCK_N, D_MAIN] and [BLOCK_N, D_REST] from query `start` on
    m_n = tl.arange(0, o_row.shape[0]) < n - start
    p_tile = p_q + start * stride_qn
    b_q = load_rows(p_tile, o_row, m_n, stride_qd, D, 0, D_MAIN, UPCAST)
    b_q_rest = b_q
    if D_REST > 0:
        b_q_rest = load_rows(p_tile, o_row, m_n, stride_qd, D, D_MAIN, D_REST, UPCAST)
    return b_q, b_q_rest


@triton.jit
def _resident_kernel(
    p_query, p_key, p_value, p_bias, p_matrix, p_mean, p_out,
    n, K, H,
    stride_qb, stride_qh, stride_qn, stride_qd,
    stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd,
    stride_bb, stride_bh, stride_bk, corrections, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr, E_MAIN: tl.constexpr, E_REST: tl.constexpr,
    TWO_PARTS: tl.constexpr, FULL_K: tl.constexpr, WITH_BIAS: tl.constexpr, SCALED: tl.constexpr,
    ALIGNED: tl.constexpr, CORRECTED: tl.constexpr, AHEAD: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qh = in_eights(stride_qb, ALIGNED), in_eights(stride_qh, ALIGNED)
    stride_kb, stride_kh = in_eights(stride_kb, ALIGNED), in_eights(stride_kh, ALIGNED)
    stride_vb, stride_vh = in_eights(stride_vb, ALIGNED), in_eights(stride_vh, ALIGNED)
    stride_qn, stride_kn = in_eights(stride_qn, ALIGNED), in_eights(stride_kn, ALIGNED)
    stride_vn = in_eights(stride_vn, ALIGNED)
    factor = 1.0 if SCALED else scale
    # Only the first axis of a grid may exceed 65,535.
    lead = tl.program_id(0)
    batch = (lead // H).to(tl.int64)
    head = (lead % H).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_k = p_key + batch * stride_kb + head * stride_kh
    p_v = p_value + batch * stride_vb + head * stride_vh
    p_b = p_bias + batch * stride_bb + head * stride_bh
    # [BLOCK_K, ...]
    b_k = load_rows(p_k, o_k * stride_kn, m_k, stride_kd, D, 0, D_MAIN, UPCAST)
    b_v = load_rows(p_v, o_k * stride_vn, m_k, stride_vd, E, 0, E_MAIN, UPCAST)
    b_k_rest, b_v_rest = b_k, b_v
    if D_REST > 0:
        b_k_rest = load_rows(p_k, o_k * stride_kn, m_k, stride_kd, D, D_MAIN, D_REST, UPCAST)
    if E_REST > 0:
        b_v_rest = load_rows(p_v, o_k * stride_vn, m_k, stride_vd, E, E_MAIN, E_REST, UPCAST)
    if TWO_PARTS:
        m_l = o_k < K - BLOCK_K
        p_k += BLOCK_K * stride_kn
        p_v += BLOCK_K * stride_vn
        b_l = load_rows(p_k, o_k * stride_kn, m_l, stride_kd, D, 0, D_MAIN, UPCAST)
        b_u = load_rows(p_v, o_k * stride_vn, m_l, stride_vd, E, 0, E_MAIN, UPCAST)
        b_l_rest, b_u_rest = b_l, b_u
        if D_REST > 0:
            b_l_rest = load_rows(p_k, o_k * stride_kn, m_l, stride_kd, D, D_MAIN, D_REST, UPCAST)
        if E_REST > 0:
            b_u_rest = load_rows(p_v, o_k * stride_vn, m_l, stride_vd, E, E_MAIN, E_REST, UPCAST)
    p_q = p_query + batch * stride_qb + head * stride_qh
    o_n = tl.arange(0, BLOCK_N)
    first = tl.program_id(1).to(tl.int64) * BLOCK_N
    o_row = o_n * stride_qn
    step = tl.num_programs(1) * BLOCK_N
    if AHEAD:
        b_next, b_next_rest = _queries(
            p_q, first, o_row, n, stride_qn, stride_qd, D, D_MAIN, D_REST, UPCAST
        )
    for offset in tl.range(0, n - first, step, disable_licm=AHEAD):
        start = first + offset
        m_n = o_n < n - start
        p_q_tile = p_q + start * stride_qn
        if AHEAD:
            b_q, b_q_rest = b_next, b_next_rest
        else:
            b_q, b_q_rest = _queries(
                p_q, start, o_row, n, stride_qn, stride_qd, D, D_MAIN, D_REST, UPCAST
            )
        b_s = _logits(
            b_q, b_q_rest, b_k, b_k_rest, p_b, stride_bk, m_k, scale,
            D_REST, WITH_BIAS, SCALED, FULL_K or TWO_PARTS, AHEAD, PRECISION,
        )  # fmt: skip
        b_max, b_sum, b_out, b_out_rest = 0, 0, 0, 0
        if TWO_PARTS:
            b_max, b_sum, b_out, b_out_rest = _attend(
                b_s, b_v, b_v_rest, b_max, b_sum, b_out, b_out_rest, factor,
                E_REST, WITH_BIAS, True, PRECISION,
            )  # fmt: skip
            b_s = _logits(
                b_q, b_q_rest, b_l, b_l_rest, p_b + BLOCK_K * stride_bk, stride_bk, m_l, scale,
                D_REST, WITH_BIAS, SCALED, FULL_K, AHEAD, PRECISION,
            )  # fmt: skip
        if AHEAD:
            b_next, b_next_rest = _queries(
                p_q, start + step, o_row, n, stride_qn, stride_qd, D, D_MAIN, D_REST, UPCAST
            )
        b_max, b_sum, b_out, b_out_rest = _attend(
            b_s, b_u if TWO_PARTS else b_v, b_u_rest if TWO_PARTS else b_v_rest,
            b_max, b_sum, b_out, b_out_rest, factor,
            E_REST, WITH_BIAS, not TWO_PARTS, PRECISION,
        )  # fmt: skip
        b_share = reciprocal(b_sum)[:, None]
        p_row = p_out + ((batch * n + start) * H + head) * E
        b_out = b_out * b_share
        if E_REST > 0:
            b_out_rest = b_out_rest * b_share
        if CORRECTED:
            place = lead % corrections
            p_e, p_m = p_matrix + place * ((D + 1) * E), p_mean + place * D
            b_out = corrected(
                b_out, p_q_tile, o_row, m_n, stride_qd, p_e, p_m, D, E,
                0, E_MAIN, PRECISION, UPCAST,
            )  # fmt: skip
            if E_REST > 0:
                b_out_rest = corrected(
                    b_out_rest, p_q_tile, o_row, m_n, stride_qd, p_e, p_m, D, E,
                    E_MAIN, E_REST, PRECISION, UPCAST,
                )  # fmt: skip
        store_rows(p_row, o_n * (H * E), m_n, E, b_out, 0, E_MAIN)
        if E_REST > 0:
            store_rows(p_row, o_n * (H * E), m_n, E, b_out_rest, E_MAIN, E_REST)


def options_of(query: Layout, key: Layout, value: Layout, extra: str) -> dict[str, int]:
    """Tiles and launch options where this kernel serves the call; else empty.

    `extra` is "", "bias" or "correction", the latter with a bias or without.
    """
    width = max(query.shape[-1], value.shape[-1])
    near = all(offsets_fit(tensor) for tensor in (query, key, value))
    half = query.element_size() == 2
    if not (half and near and width <= WIDTHS[-1] and key.shape[-2] <= LARGEST_BASES):
        return {}
    padded = next(bound for bound in WIDTHS if width <= bound)
    return tiles(f"resident_attention {padded} {extra}".rstrip(), query.device)


def resident_attention(
    program: Program,
    inputs: Sequence[Buffer],
    with_bias: bool,
    corrections: int,
    scale: float,
    out: Buffer,
    options: dict[str, int],
) -> None:
    """Add the launch that writes into `out`, contiguous [B, n, h, e].

    Args:
        program: Program to add it to.
        inputs: query [B, h, n, d], key [B, h, K, d], value [B, h, K, e] and bias [B, h, K], any
            strides; correction [B or 1, h, d + 1, e] and mean query [B or 1, h, d], float32 and
            contiguous. Anything for those that there are not.
        with_bias: Whether there is a bias.
        corrections: Number of heads with a correction of their own, B h or h; 0 without one.
        scale: Factor of the logits.
        out: Output.
        options: Tiles and launch options, from `options_of`.
    """
    query, key, value, bias = (tensor.layout for tensor in inputs[:4])
    batch, heads, n, dim = query.shape
    num_bases, width = value.shape[-2:]
    block_n = options.pop("block_n")
    programs = max(1, options.pop("programs") // (batch * heads))
    ahead = options.pop("ahead", 0) == 1
    block_k = tile_for(num_bases, LARGEST_BASES // options.pop("parts"))
    d_main, d_rest = two_tiles(dim)
    e_main, e_rest = two_tiles(width)
    program.launch(
        _resident_kernel,
        (batch * heads, min(programs, triton.cdiv(n, block_n))),
        (*inputs, out),
        (
            n, num_bases, heads, *query.stride(), *key.stride(), *value.stride(),
            *(bias.stride() if with_bias else (0, 0, 0)), corrections, scale * math.log2(math.e),
        ),
        D=dim, E=width, BLOCK_N=block_n, BLOCK_K=block_k,
        D_MAIN=d_main, D_REST=d_rest, E_MAIN=e_main, E_REST=e_rest,
        TWO_PARTS=num_bases > block_k, FULL_K=num_bases % block_k == 0,
        WITH_BIAS=with_bias, SCALED=scale < LEAST_SCALE,
        ALIGNED=aligned(query, key, value), CORRECTED=corrections > 0, AHEAD=ahead,
        **dot_options(query.dtype), **options,
    )  # fmt: skip
