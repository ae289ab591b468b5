"""One EM pass for any n, K, D and E, and for float32: two kernels.

The first writes each token's log-sum-exp over all bases, [n] floats. The second gives every program
a slice of the bases and a slice of the channels: it makes its bases' logits again, turns them into
responsibilities with the stored log-sum-exp, and adds up their products.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..precision import dot_options, weight_unit
from ..program import Buffer, Program
from ..tiles import aligned, head_of, in_eights
from ..tuning import sum_ranges, tile_for, tiles
from .update import Parts


@triton.jit
def _logits(
    p_token, m_n, stride_xd, p_base, m_k, D, scale, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    # [BLOCK_K, BLOCK_N]
    b_logits = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        o_d = d + tl.arange(0, BLOCK_D).to(tl.int64)
        m_d = o_d < D
        # [BLOCK_D, BLOCK_N]
        b_x = tl.load(
            p_token[None, :] + (o_d * stride_xd)[:, None],
            mask=m_d[:, None] & m_n[None, :], other=0.0,
        )  # fmt: skip
        # [BLOCK_K, BLOCK_D]
        b_base = tl.load(
            p_base[:, None] + o_d[None, :], mask=m_k[:, None] & m_d[None, :], other=0.0
        )
        if UPCAST:
            b_base, b_x = b_base.to(tl.float32), b_x.to(tl.float32)
        b_logits = tl.dot(b_base, b_x, b_logits, input_precision=PRECISION)
    return tl.where(m_k[:, None], b_logits * scale, float("-inf"))


# Only the first axis of a grid may exceed 65,535, so heads and tiles of tokens share it.
@triton.jit
def _logsumexp_kernel(
    p_features, p_directions, p_logsumexp,
    n, K, D, H, stride_xb, stride_xh, stride_xn, stride_xd, scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    D, stride_xn = in_eights(D, ALIGNED), in_eights(stride_xn, ALIGNED)
    tiles = tl.cdiv(n, BLOCK_N)
    lead = (tl.program_id(0) // tiles).to(tl.int64)
    o_n = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < n
    p_token = head_of(p_features, lead, H, stride_xb, stride_xh, ALIGNED) + o_n * stride_xn
    # [BLOCK_N]
    b_max = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_s = _logits(
            p_token, m_n, stride_xd, p_directions + (lead * K + o_k) * D, o_k < K, D, scale,
            BLOCK_K, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        b_new = tl.maximum(b_max, tl.max(b_s, axis=0))
        b_sum = b_sum * tl.exp2(b_max - b_new) + tl.sum(tl.exp2(b_s - b_new[None, :]), axis=0)
        b_max = b_new
    tl.store(p_logsumexp + lead * n + o_n, b_max + tl.log2(b_sum), mask=m_n)


@triton.jit
def _sums_kernel(
    p_features, p_directions, p_logsumexp, p_values, p_sums, p_mass,
    n, K, D, E, H, tokens_per_split,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_vb, stride_vh, stride_vn, stride_vd, scale,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WITH_MASS: tl.constexpr, LOG_UNIT: tl.constexpr, ALIGNED: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    D, E = in_eights(D, ALIGNED), in_eights(E, ALIGNED)
    stride_xn, stride_vn = in_eights(stride_xn, ALIGNED), in_eights(stride_vn, ALIGNED)
    e_tiles = tl.cdiv(E, BLOCK_E)
    e_tile = tl.program_id(1) % e_tiles
    o_k = (tl.program_id(1) // e_tiles) * BLOCK_K + tl.arange(0, BLOCK_K)
    o_e = (e_tile * BLOCK_E + tl.arange(0, BLOCK_E)).to(tl.int64)
    m_k = o_k < K
    m_e = o_e < E
    split = tl.program_id(2).to(tl.int64)
    lead = tl.program_id(0).to(tl.int64)
    p_token = head_of(p_features, lead, H, stride_xb, stride_xh, ALIGNED)
    p_value = head_of(p_values, lead, H, stride_vb, stride_vh, ALIGNED)
    p_base = p_directions + (lead * K + o_k) * D
    # [BLOCK_K, BLOCK_E]
    b_sums = tl.zeros((BLOCK_K, BLOCK_E), dtype=tl.float32)
    # [BLOCK_K]
    b_mass = tl.zeros((BLOCK_K,), dtype=tl.float32)
    start = split * tokens_per_split
    for offset in range(0, tokens_per_split, BLOCK_N):
        o_n = start + offset + tl.arange(0, BLOCK_N)
        m_n = o_n < n
        b_s = _logits(
            p_token + o_n * stride_xn, m_n, stride_xd, p_base, m_k, D, scale,
            BLOCK_K, BLOCK_N, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        b_lse = tl.load(p_logsumexp + lead * n + o_n, mask=m_n, other=float("inf"))
        b_z = tl.exp2(b_s - (b_lse - LOG_UNIT)[None, :])
        # [BLOCK_N, BLOCK_E]
        b_v = tl.load(
            p_value + (o_n * stride_vn)[:, None] + (o_e * stride_vd)[None, :],
            mask=m_n[:, None] & m_e[None, :], other=0.0,
        )  # fmt: skip
        b_w = b_z.to(b_v.dtype)
        if UPCAST:
            b_w, b_v = b_w.to(tl.float32), b_v.to(tl.float32)
        b_sums = tl.dot(b_w, b_v, b_sums, input_precision=PRECISION)
        if WITH_MASS:
            b_mass += tl.sum(b_z, axis=1)
    row = (split * tl.num_programs(0) + lead) * K + o_k
    tl.store(p_sums + (row * E)[:, None] + o_e[None, :], b_sums, mask=m_k[:, None] & m_e[None, :])
    if WITH_MASS:
        tl.store(p_mass + row, b_mass, mask=m_k & (e_tile == 0))


def general_pass(
    program: Program,
    features: Buffer,
    directions: Buffer,
    payload: Buffer | None,
    scale: float,
) -> Parts:
    """Add a pass to a program, as `fused.fused_pass` does."""
    tokens, num_bases = features.layout, directions.layout.shape[-2]
    batch, heads, n, dim = tokens.shape
    options = tiles("em_general", tokens.device)
    block_n = options.pop("block_n")
    block_k = tile_for(num_bases, options.pop("block_k"))
    block_d = tile_for(dim, options.pop("block_d"))
    del options["programs"]
    logsumexp = program.memory("log-sum-exp", (batch, heads, n), torch.float32)
    program.launch(
        _logsumexp_kernel,
        (triton.cdiv(n, block_n) * batch * heads,),
        (features, directions, logsumexp),
        (n, num_bases, dim, heads, *tokens.strides, scale),
        BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d,
        ALIGNED=dim % 8 == 0 and aligned(tokens), **dot_options(tokens.dtype), **options,
    )  # fmt: skip
    arguments = (program, features, directions, logsumexp)
    parts = _accumulate(*arguments, None, scale)
    if payload is None:
        return parts
    return replace(parts, payload=_accumulate(*arguments, payload, scale).payload)


def _accumulate(
    program: Program,
    features: Buffer,
    directions: Buffer,
    logsumexp: Buffer,
    payload: Buffer | None,
    scale: float,
) -> Parts:
    """The sums of the features with the mass, or those of a payload without."""
    tokens, num_bases = features.layout, directions.layout.shape[-2]
    values = features if payload is None else payload
    batch, heads, n, dim = tokens.shape
    width = values.layout.shape[-1]
    options = tiles("em_general", tokens.device)
    block_n = options.pop("block_n")
    block_k = tile_for(num_bases, options.pop("block_k"))
    block_d = tile_for(dim, options["block_d"])
    block_e = tile_for(width, options.pop("block_d"))
    slices = triton.cdiv(num_bases, block_k) * triton.cdiv(width, block_e)
    programs = options.pop("programs") // (slices * batch * heads)
    splits, tokens_per_split = sum_ranges(n, block_n, programs)
    lead = (splits, batch, heads, num_bases)
    name = "parts" if payload is None else "payload parts"
    sums = program.memory(name, (*lead, width), torch.float32)
    mass = sums if payload is not None else program.memory("mass parts", lead, torch.float32)
    program.launch(
        _sums_kernel,
        (batch * heads, slices, splits),
        (features, directions, logsumexp, values, sums, mass),
        (
            n, num_bases, dim, width, heads, tokens_per_split,
            *tokens.strides, *values.layout.strides, scale,
        ),
        BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d, BLOCK_E=block_e,
        WITH_MASS=payload is None, LOG_UNIT=math.log2(weight_unit(tokens.dtype)),
        ALIGNED=dim % 8 == width % 8 == 0 and aligned(tokens, values.layout),
        **dot_options(tokens.dtype), **options,
    )  # fmt: skip
    return Parts(sums, mass, None if payload is None else sums)
