"""Means of a video's tokens by base, and moments of what those leave out, in Triton.

Tokens come sorted by base. A program of the first kernel adds up one base's, read once; one of the
second multiplies a range of tokens, less the means of their bases, and torch adds up the ranges.
Both take their time for memory: 2 (d + e) FLOPs a token and channel beside 2 (d + e) bytes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..precision import dot_options
from ..program import Buffer, Layout, Program, programs
from ..tiles import aligned, in_eights
from ..tuning import sum_ranges, tile_for, tiles
from .patches import LARGEST_HEAD, needs_64_bits
from .window import load_numbered


@triton.jit
def _means_kernel(
    p_key, p_value, p_order, p_starts, p_base_key, p_base_value, p_key_rounded, p_value_rounded,
    p_bias,
    n, K, PADDED, H,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr, LARGE: tl.constexpr,
):  # fmt: skip
    stride_kb, stride_kh = in_eights(stride_kb, ALIGNED), in_eights(stride_kh, ALIGNED)
    stride_vb, stride_vh = in_eights(stride_vb, ALIGNED), in_eights(stride_vh, ALIGNED)
    stride_kn, stride_vn = in_eights(stride_kn, ALIGNED), in_eights(stride_vn, ALIGNED)
    base = tl.program_id(0).to(tl.int64)
    lead, k = base // PADDED, base % PADDED
    p_key += lead // H * stride_kb + lead % H * stride_kh
    p_value += lead // H * stride_vb + lead % H * stride_vh
    p_first = p_starts + lead * K + k
    first = tl.load(p_first, mask=k < K, other=0)
    last = tl.load(p_first + 1, mask=k < K, other=0)
    # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_E]
    b_key = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    b_value = tl.zeros((BLOCK_N, BLOCK_E), dtype=tl.float32)
    for place in tl.range(first, last, BLOCK_N):
        o_place = place + tl.arange(0, BLOCK_N)
        m_n = o_place < last
        o_n = (tl.load(p_order + o_place, mask=m_n, other=0) - lead * n).to(tl.int32)
        b_key += load_numbered(p_key, o_n, stride_kn, stride_kd, m_n, D, BLOCK_D, LARGE, True)
        b_value += load_numbered(p_value, o_n, stride_vn, stride_vd, m_n, E, BLOCK_E, LARGE, True)
    count = (last - first).to(tl.float32)
    share = 1.0 / tl.maximum(count, 1.0)
    o_d, o_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    # [BLOCK_D], [BLOCK_E]
    b_key_mean, b_value_mean = tl.sum(b_key, axis=0) * share, tl.sum(b_value, axis=0) * share
    tl.store(p_base_key + base * D + o_d, b_key_mean, mask=o_d < D)
    tl.store(p_base_value + base * E + o_e, b_value_mean, mask=o_e < E)
    b_key_mean = b_key_mean.to(p_key_rounded.dtype.element_ty)
    b_value_mean = b_value_mean.to(p_value_rounded.dtype.element_ty)
    tl.store(p_key_rounded + base * D + o_d, b_key_mean, mask=o_d < D)
    tl.store(p_value_rounded + base * E + o_e, b_value_mean, mask=o_e < E)
    # A base without tokens has no weight.
    b_bias = tl.where(count > 0, tl.log2(tl.maximum(count, 1.0)), float("-inf"))
    tl.store(p_bias + base, b_bias)


@triton.jit
def _centred(
    p_rows, p_means, o_n, o_base, m_n, stride_n, stride_d,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, CENTRED: tl.constexpr, LARGE: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK]: rows, less those of their bases' means if CENTRED."""
    b_rows = load_numbered(p_rows, o_n, stride_n, stride_d, m_n, WIDTH, BLOCK, LARGE, False)
    if CENTRED:
        b_mean = load_numbered(p_means, o_base, WIDTH, 1, m_n, WIDTH, BLOCK, False, False)
        b_rows = (b_rows.to(tl.float32) - b_mean.to(tl.float32)).to(p_rows.dtype.element_ty)
    return b_rows.to(tl.float32) if UPCAST else b_rows


@triton.jit
def _products_of_tokens_kernel(
    p_left, p_right, p_assignment, p_left_means, p_right_means, p_parts,
    n, PADDED, H, tokens_per_split,
    stride_lb, stride_lh, stride_ln, stride_ld, stride_rb, stride_rh, stride_rn, stride_rd,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, CENTRED: tl.constexpr, ALIGNED: tl.constexpr, LARGE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_lb, stride_lh = in_eights(stride_lb, ALIGNED), in_eights(stride_lh, ALIGNED)
    stride_rb, stride_rh = in_eights(stride_rb, ALIGNED), in_eights(stride_rh, ALIGNED)
    stride_ln, stride_rn = in_eights(stride_ln, ALIGNED), in_eights(stride_rn, ALIGNED)
    lead = tl.program_id(0).to(tl.int64)
    p_left += lead // H * stride_lb + lead % H * stride_lh
    p_right += lead // H * stride_rb + lead % H * stride_rh
    p_assignment += lead * n
    p_left_means += lead * PADDED * D
    p_right_means += lead * PADDED * E
    # [BLOCK_D, BLOCK_E]
    b_sums = tl.zeros((BLOCK_D, BLOCK_E), dtype=tl.float32)
    begin = tl.program_id(1) * tokens_per_split
    end = tl.minimum(begin + tokens_per_split, n)
    for first in tl.range(begin, end, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        o_base = o_n
        if CENTRED:
            o_base = tl.load(p_assignment + o_n, mask=m_n, other=0)
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_E]
        b_left = _centred(
            p_left, p_left_means, o_n, o_base, m_n, stride_ln, stride_ld, D, BLOCK_D, CENTRED,
            LARGE, UPCAST,
        )  # fmt: skip
        b_right = _centred(
            p_right, p_right_means, o_n, o_base, m_n, stride_rn, stride_rd, E, BLOCK_E, CENTRED,
            LARGE, UPCAST,
        )  # fmt: skip
        b_sums = tl.dot(tl.trans(b_left), b_right, b_sums, input_precision=PRECISION)
    o_d, o_e = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_E)
    row = (tl.program_id(1) * tl.num_programs(0) + lead) * D + o_d
    tl.store(
        p_parts + (row * E)[:, None] + o_e[None, :],
        b_sums, mask=(o_d < D)[:, None] & (o_e < E)[None, :],
    )  # fmt: skip


def grouped(assignment: torch.Tensor, num_bases: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of all B h n tokens in the order of their bases, int64, and where each base's begin,
    int32 [B h K + 1].

    Args:
        assignment: Number of each token's base, int32 [B, h, n].
        num_bases: Number K of bases.
    """
    leads = assignment.shape[0] * assignment.shape[1]
    # A sort takes a pass for each of their bytes.
    dtype = torch.int16 if leads * num_bases < 2**15 else torch.int32
    edges = torch.arange(leads * num_bases + 1, dtype=dtype, device=assignment.device)
    numbers = assignment.flatten(0, 1) + edges[:-1:num_bases].unsqueeze(-1)
    found, order = numbers.to(dtype).flatten().sort(stable=True)
    return order, torch.searchsorted(found, edges, out_int32=True)


@programs
def _means_program(
    key: Layout, value: Layout, order: Layout, starts: Layout, num_bases: int, padded: int
) -> tuple[Program, list[int]]:
    batch, heads, n, dim = key.shape
    width = value.shape[-1]
    program = Program(key.device)
    inputs = [program.input(layout) for layout in (key, value, order, starts)]
    lead = (batch, heads, padded)
    outputs = [
        program.memory(name, (*lead, size), dtype)
        for name, size, dtype in (
            ("key", dim, torch.float32), ("value", width, torch.float32),
            ("rounded key", dim, key.dtype), ("rounded value", width, key.dtype),
        )
    ]  # fmt: skip
    outputs.append(program.memory("bias", lead, torch.float32))
    program.launch(
        _means_kernel,
        (batch * heads * padded,),
        (*inputs, *outputs),
        (n, num_bases, padded, heads, *key.strides, *value.strides),
        D=dim, E=width,
        BLOCK_D=tile_for(dim, LARGEST_HEAD), BLOCK_E=tile_for(width, LARGEST_HEAD),
        ALIGNED=aligned(key, value), LARGE=needs_64_bits(key, value),
        **tiles("token_means", key.device),
    )  # fmt: skip
    return program, [output.place for output in outputs]


def means(
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    num_bases: int,
    padded: int,
) -> list[torch.Tensor]:
    """Means of tokens by base, with bases of no tokens up to `padded` of a head.

    Args:
        key: Keys [B, h, n, d], any strides.
        value: Values [B, h, n, e].
        assignment: Number of each token's base, int32 [B, h, n].
        num_bases: Number K of bases.
        padded: Number of rows of a head in what is returned, at least K.

    Returns:
        Means of keys and values, float32 [B, h, padded, d] and [B, h, padded, e]; the same in the
        inputs' dtype; log2 of the number of tokens, float32 [B, h, padded].
    """
    tensors = (key, value, *grouped(assignment, num_bases))
    program, places = _means_program(*map(Layout.of, tensors), num_bases, padded)
    found = program(*tensors)
    return [found[place] for place in places]


@programs
def _products_program(
    key: Layout,
    value: Layout,
    query: Layout,
    assignment: Layout,
    base_key: Layout,
    base_value: Layout,
) -> tuple[Program, list[int]]:
    program = Program(key.device)
    keys, values, queries, numbers, means_of_keys, means_of_values = (
        program.input(layout) for layout in (key, value, query, assignment, base_key, base_value)
    )
    pairs = (
        (keys, values, means_of_keys, means_of_values, True),
        (keys, keys, means_of_keys, means_of_keys, True),
        (queries, queries, means_of_keys, means_of_keys, False),
    )
    return program, [_products_of(program, numbers, *pair) for pair in pairs]


def _products_of(
    program: Program,
    assignment: Buffer,
    left: Buffer,
    right: Buffer,
    left_means: Buffer,
    right_means: Buffer,
    centred: bool,
) -> int:
    """The place of products [splits, B, h, d, e] of left and right tokens."""
    batch, heads, n, dim = left.layout.shape
    width = right.layout.shape[-1]
    options = tiles("token_products", left.layout.device)
    ranges = options.pop("programs") // (batch * heads)
    splits, tokens = sum_ranges(n, options["block_n"], ranges)
    shape = (splits, batch, heads, dim, width)
    parts = program.memory(f"parts {left.place} {right.place}", shape, torch.float32)
    program.launch(
        _products_of_tokens_kernel,
        (batch * heads, splits),
        (left, right, assignment, left_means, right_means, parts),
        (
            n, left_means.layout.shape[-2], heads, tokens,
            *left.layout.strides, *right.layout.strides,
        ),
        D=dim, E=width, BLOCK_N=options.pop("block_n"),
        BLOCK_D=tile_for(dim, LARGEST_HEAD), BLOCK_E=tile_for(width, LARGEST_HEAD),
        CENTRED=centred, ALIGNED=aligned(left.layout, right.layout),
        LARGE=needs_64_bits(left.layout, right.layout),
        **dot_options(left.layout.dtype), **options,
    )  # fmt: skip
    return parts.place


def products(
    key: torch.Tensor,
    value: torch.Tensor,
    query: torch.Tensor,
    assignment: torch.Tensor,
    base_key: torch.Tensor,
    base_value: torch.Tensor,
) -> list[torch.Tensor]:
    """Means over tokens of (k - c)^T (v - v_c), (k - c)^T (k - c) and q^T q, c a token's base.

    Differences are rounded to the inputs' dtype, in half precision; sums are float32.

    Args:
        key: Keys [B, h, n, d], any strides, in half precision.
        value: Values [B, h, n, e].
        query: Queries [B, h, n, d].
        assignment: Number of each token's base, int32 [B, h, n].
        base_key: Means of keys [B, h, K or more, d] in the same dtype.
        base_value: Means of values [B, h, K or more, e].

    Returns:
        float32 [B, h, d, e], [B, h, d, d] and [B, h, d, d].
    """
    tensors = (key, value, query, assignment, base_key, base_value)
    program, places = _products_program(*map(Layout.of, tensors))
    found = program(*tensors)
    return [found[place].sum(0) / key.shape[2] for place in places]
