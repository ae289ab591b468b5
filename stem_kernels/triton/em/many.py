"""One EM pass with many bases, of narrow tokens in half precision: two kernels.

The first writes each token's log-sum-exp over all bases. In the second a program holds a tile of
bases and their sums, makes the logits of its tokens again, and adds up their products. Unlike
`general` both hold whole rows of channels, so that tiles of a single loop follow one another
from memory while products run.

Per (token, base): 6 D FLOPs and two exp2. Floor on an H100 at D = 128: the matrix units.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ..precision import dot_options, weight_unit
from ..program import Buffer, Program
from ..tiles import aligned, head_of, in_eights, load_rows, row_max, row_sum
from ..tuning import sum_ranges, tile_for, tiles
from .update import Parts

LARGEST_WIDTH = 128


@triton.jit
def _many_mass_kernel(
    p_features, p_directions, p_logsumexp,
    n, K, H, stride_xb, stride_xh, stride_xn, stride_xd, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    FULL: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_xn = in_eights(stride_xn, ALIGNED)
    # Only the first axis of a grid may exceed 65,535, so heads and tiles of tokens share it.
    tiles = tl.cdiv(n, BLOCK_N)
    lead = (tl.program_id(0) // tiles).to(tl.int64)
    start = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    m_n = o_n < n - start
    p_x = head_of(p_features, lead, H, stride_xb, stride_xh, ALIGNED) + start * stride_xn
    p_directions += lead * K * D
    # [BLOCK_N, BLOCK_D]
    b_x = load_rows(p_x, o_n * stride_xn, m_n, stride_xd, D, 0, BLOCK_D, UPCAST)
    # [BLOCK_N]
    b_max = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in tl.range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        m_k = o_k < K
        # [BLOCK_K, BLOCK_D], [BLOCK_N, BLOCK_K]
        b_base = load_rows(p_directions, o_k * D, m_k, 1, D, 0, BLOCK_D, UPCAST)
        b_s = tl.dot(b_x, tl.trans(b_base), input_precision=PRECISION)
        if not FULL:
            b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new = tl.maximum(b_max, row_max(b_s) * scale)
        b_sum = b_sum * tl.exp2(b_max - b_new) + row_sum(tl.exp2(b_s * scale - b_new[:, None]))
        b_max = b_new
    tl.store(p_logsumexp + lead * n + start + o_n, b_max + tl.log2(b_sum), mask=m_n)


@triton.jit
def _many_sums_kernel(
    p_features, p_directions, p_logsumexp, p_sums, p_mass,
    n, K, H, tokens_per_split, stride_xb, stride_xh, stride_xn, stride_xd, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    LOG_UNIT: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_xn = in_eights(stride_xn, ALIGNED)
    lead = tl.program_id(0).to(tl.int64)
    split = tl.program_id(2).to(tl.int64)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    start = split * tokens_per_split
    count = tl.minimum(n - start, tokens_per_split).to(tl.int32)
    p_x = head_of(p_features, lead, H, stride_xb, stride_xh, ALIGNED) + start * stride_xn
    p_logsumexp += lead * n + start
    # [BLOCK_K, BLOCK_D]
    b_base = load_rows(p_directions + lead * K * D, o_k * D, m_k, 1, D, 0, BLOCK_D, UPCAST)
    b_sums = tl.zeros((BLOCK_K, BLOCK_D), dtype=tl.float32)
    # [BLOCK_K]
    b_mass = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for first in tl.range(0, count, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < count
        # [BLOCK_N, BLOCK_D], [BLOCK_K, BLOCK_N]
        b_x = load_rows(p_x, o_n * stride_xn, m_n, stride_xd, D, 0, BLOCK_D, UPCAST)
        b_s = tl.dot(b_base, tl.trans(b_x), input_precision=PRECISION)
        # Tokens past the end have no share in any base.
        b_lse = tl.load(p_logsumexp + o_n, mask=m_n, other=float("inf"))
        b_z = tl.exp2(b_s * scale - (b_lse - LOG_UNIT)[None, :])
        b_mass += row_sum(b_z)
        b_w = b_z.to(p_features.dtype.element_ty)
        if UPCAST:
            b_w = b_w.to(tl.float32)
        b_sums = tl.dot(b_w, b_x, b_sums, input_precision=PRECISION)
    row = (split * tl.num_programs(0) + lead) * K + o_k
    o_d = tl.arange(0, BLOCK_D)
    tl.store(
        p_sums + (row * D)[:, None] + o_d[None, :], b_sums, mask=m_k[:, None] & (o_d < D)[None, :]
    )
    tl.store(p_mass + row, b_mass, mask=m_k)


def many_options(features: Buffer) -> dict[str, int]:
    """Tiles and launch options; none where there are no such kernels for the device or width."""
    layout = features.layout
    if layout.shape[-1] > LARGEST_WIDTH or layout.element_size() != 2:
        return {}
    return tiles("em_many", layout.device)


def many_pass(
    program: Program, features: Buffer, directions: Buffer, scale: float, options: dict[str, int]
) -> Parts:
    """Add a pass to a program, as `fused.fused_pass` does, without a payload.

    Args:
        program: Program.
        features: Tokens [B, h, n, D].
        directions: Bases as they are multiplied, contiguous [B, h, K, D].
        scale: Factor of the logits, in base 2.
        options: What `many_options` gave.
    """
    tokens, num_bases = features.layout, directions.layout.shape[-2]
    batch, heads, n, dim = tokens.shape
    rows, block_n, block_k = (options.pop(f"block_{axis}") for axis in ("rows", "n", "k"))
    per_multiprocessor = options.pop("programs")
    logsumexp = program.memory("log-sum-exp", (batch, heads, n), torch.float32)
    constants = {
        "D": dim, "BLOCK_D": tile_for(dim, LARGEST_WIDTH),
        "ALIGNED": dim % 8 == 0 and aligned(tokens), **dot_options(tokens.dtype), **options,
    }  # fmt: skip
    program.launch(
        _many_mass_kernel,
        (triton.cdiv(n, rows) * batch * heads,),
        (features, directions, logsumexp),
        (n, num_bases, heads, *tokens.strides, scale),
        BLOCK_N=rows, BLOCK_K=block_n, FULL=num_bases % block_n == 0, **constants,
    )  # fmt: skip
    slices = triton.cdiv(num_bases, block_k)
    splits, count = sum_ranges(n, block_n, per_multiprocessor // (slices * batch * heads))
    lead = (splits, batch, heads, num_bases)
    sums = program.memory("parts", (*lead, dim), torch.float32)
    mass = program.memory("mass parts", lead, torch.float32)
    program.launch(
        _many_sums_kernel,
        (batch * heads, slices, splits),
        (features, directions, logsumexp, sums, mass),
        (n, num_bases, heads, count, *tokens.strides, scale),
        BLOCK_N=block_n, BLOCK_K=block_k,
        LOG_UNIT=math.log2(weight_unit(tokens.dtype)), **constants,
    )  # fmt: skip
    return Parts(sums, mass, None)
