"""`moments` in Triton: two launches, one over tiles of tokens and one that adds up their parts.

A program of the first has one head and a tile of the tokens. It makes their responsibilities anew,
which are the only sizeable work (2 m K D FLOPs), takes from keys and values what bases say of them,
and writes the product of the two, [d, e], and the sum of the squared logits that queries give what
is left of the keys. In half precision everything is rounded to the keys' dtype before it is
multiplied; sums are float32.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from ...shared.bases import NORM_EPS
from ...shared.outputs import moments_output
from .. import interpreted
from ..precision import dot_options
from ..program import Layout, Program, programs
from ..registration import operator
from ..tiles import aligned, head_of, in_eights, load_rows, reciprocal, store_rows
from ..tuning import tile_for, tiles
from .fused import LARGEST_BASES
from .update import added_parts, block_of_parts, block_of_rows

LARGEST_HEAD = 160
LARGEST_TILE = 256


@triton.jit
def _left_out(
    p_rows, p_base, b_w, o_row, o_base, m_row, m_base, stride_row, stride_base, width,
    BLOCK: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK]: channels of rows less those of their bases, of which they are b_w."""
    b_row = load_rows(p_rows, o_row, m_row, stride_row, width, 0, BLOCK, UPCAST)
    b_base = load_rows(p_base, o_base, m_base, stride_base, width, 0, BLOCK, UPCAST)
    b_rest = b_row.to(tl.float32) - tl.dot(b_w, b_base, input_precision=PRECISION)
    b_rest = b_rest.to(p_rows.dtype.element_ty)
    return b_rest.to(tl.float32) if UPCAST else b_rest


@triton.jit
def _moments_kernel(
    p_key, p_value, p_query, p_features, p_bases, p_base_key, p_base_value, p_parts, p_spread,
    m, r, K, H, C, D, E,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_vb, stride_vh, stride_vn, stride_vd,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_xb, stride_xh, stride_xn, stride_xd,
    stride_mb, stride_mh, stride_mn, stride_md, stride_cb, stride_ch, stride_cn, stride_cd,
    stride_wb, stride_wh, stride_wn, stride_wd, scale, norm_eps,
    BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    C, D, E = in_eights(C, ALIGNED), in_eights(D, ALIGNED), in_eights(E, ALIGNED)
    stride_xn, stride_mn = in_eights(stride_xn, ALIGNED), in_eights(stride_mn, ALIGNED)
    stride_kn, stride_vn = in_eights(stride_kn, ALIGNED), in_eights(stride_vn, ALIGNED)
    stride_cn, stride_wn = in_eights(stride_cn, ALIGNED), in_eights(stride_wn, ALIGNED)
    stride_qn = in_eights(stride_qn, ALIGNED)
    # Only the first axis of a grid may exceed 65,535, so heads and tiles of tokens share it.
    tiles = tl.cdiv(m, BLOCK_N)
    lead = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    start = tile.to(tl.int64) * BLOCK_N
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < m - start
    m_k = o_k < K
    p_x = head_of(p_features, lead, H, stride_xb, stride_xh, ALIGNED) + start * stride_xn
    p_m = head_of(p_bases, lead, H, stride_mb, stride_mh, ALIGNED)
    # [BLOCK_N, BLOCK_K], [BLOCK_K]
    b_s = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    b_square = tl.zeros((BLOCK_K,), dtype=tl.float32)
    for c in range(0, C, BLOCK_C):
        # [BLOCK_N, BLOCK_C], [BLOCK_K, BLOCK_C]
        b_x = load_rows(
            p_x + c * stride_xd, o_n * stride_xn, m_n, stride_xd, C - c, 0, BLOCK_C, UPCAST
        )
        b_m = load_rows(
            p_m + c * stride_md, o_k * stride_mn, m_k, stride_md, C - c, 0, BLOCK_C, True
        )
        b_square += tl.sum(b_m * b_m, axis=1)
        # Rounded as they are: a base is as long as tokens are, and its length is known at the end.
        b_m = b_m.to(p_features.dtype.element_ty)
        if UPCAST:
            b_m = b_m.to(tl.float32)
        b_s = tl.dot(b_x, tl.trans(b_m), b_s, input_precision=PRECISION)
    b_s = b_s * (scale / (tl.sqrt(b_square) + norm_eps))[None, :]
    b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    # [BLOCK_N]
    b_shift = tl.max(b_s, axis=1)
    b_z = tl.exp2(b_s - b_shift[:, None])
    # Tokens past the end are of no base, so that nothing is left of them.
    b_share = tl.where(m_n, reciprocal(tl.sum(b_z, axis=1)), 0.0)
    b_w = (b_z * b_share[:, None]).to(p_key.dtype.element_ty)
    if UPCAST:
        b_w = b_w.to(tl.float32)
    p_k = head_of(p_key, lead, H, stride_kb, stride_kh, ALIGNED) + start * stride_kn
    p_c = head_of(p_base_key, lead, H, stride_cb, stride_ch, ALIGNED)
    p_v = head_of(p_value, lead, H, stride_vb, stride_vh, ALIGNED) + start * stride_vn
    p_w = head_of(p_base_value, lead, H, stride_wb, stride_wh, ALIGNED)
    p_q = head_of(p_query, lead, H, stride_qb, stride_qh, ALIGNED)
    # What is left of keys is made again rather than held: a whole head's would spill registers.
    b_spread = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for first in range(0, r, BLOCK_R):
        o_r = first + tl.arange(0, BLOCK_R)
        # [BLOCK_N, BLOCK_R]
        b_logits = tl.zeros((BLOCK_N, BLOCK_R), dtype=tl.float32)
        for d in tl.range(0, D, BLOCK_D, num_stages=1, disable_licm=True):
            # [BLOCK_N, BLOCK_D], [BLOCK_R, BLOCK_D]
            b_k = _left_out(
                p_k + d * stride_kd, p_c + d * stride_cd, b_w, o_n * stride_kn, o_k * stride_cn,
                m_n, m_k, stride_kd, stride_cd, D - d, BLOCK_D, PRECISION, UPCAST,
            )  # fmt: skip
            b_q = load_rows(
                p_q + d * stride_qd, o_r * stride_qn, o_r < r, stride_qd, D - d, 0, BLOCK_D, UPCAST
            )
            b_logits = tl.dot(b_k, tl.trans(b_q), b_logits, input_precision=PRECISION)
        b_spread += tl.sum(b_logits * b_logits, axis=1)
    row = tile * (tl.num_programs(0) // tiles) + lead
    tl.store(p_spread + row, tl.sum(b_spread, axis=0))
    p_part = p_parts + row * D * E
    for d in tl.range(0, D, BLOCK_D, num_stages=1, disable_licm=True):
        o_d = tl.arange(0, BLOCK_D)
        # [BLOCK_N, BLOCK_D]
        b_k = _left_out(
            p_k + d * stride_kd, p_c + d * stride_cd, b_w, o_n * stride_kn, o_k * stride_cn,
            m_n, m_k, stride_kd, stride_cd, D - d, BLOCK_D, PRECISION, UPCAST,
        )  # fmt: skip
        for e in tl.range(0, E, BLOCK_E, num_stages=1, disable_licm=True):
            # [BLOCK_N, BLOCK_E]
            b_v = _left_out(
                p_v + e * stride_vd, p_w + e * stride_wd, b_w, o_n * stride_vn, o_k * stride_wn,
                m_n, m_k, stride_vd, stride_wd, E - e, BLOCK_E, PRECISION, UPCAST,
            )  # fmt: skip
            # [BLOCK_D, BLOCK_E]
            b_product = tl.dot(tl.trans(b_k), b_v, input_precision=PRECISION)
            store_rows(p_part + d * E + e, o_d * E, o_d < D - d, E - e, b_product, 0, BLOCK_E)


@triton.jit
def _moments_sum_kernel(
    p_parts, p_spread, p_correction, p_mean,
    PARTS, LEADS, D, E, factor, per_logit,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr,
    EIGHTS: tl.constexpr,
):  # fmt: skip
    E = in_eights(E, EIGHTS)
    # Rows of the correction: D of a matrix and one of zeros for each head.
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    lead, o_d = o_r // (D + 1), o_r % (D + 1)
    o_e = tl.arange(0, BLOCK_E)
    # [BLOCK_R, 1], [BLOCK_R, BLOCK_E]
    b_spread = added_parts(p_spread, lead, PARTS, LEADS, 1, BLOCK_R, BLOCK_T, 1) * per_logit
    b_sums = added_parts(p_parts, lead * D + o_d, PARTS, LEADS * D, E, BLOCK_R, BLOCK_S, BLOCK_E)
    b_sums = tl.where((o_d < D)[:, None], b_sums * (factor * tl.rsqrt(1.0 + b_spread)), 0.0)
    tl.store(
        p_correction + (o_r * E)[:, None] + o_e[None, :], b_sums,
        mask=(lead < LEADS)[:, None] & (o_e < E)[None, :],
    )  # fmt: skip
    b_zeros = tl.zeros((BLOCK_R,), dtype=tl.float32)
    tl.store(p_mean + lead * D + o_d, b_zeros, mask=(lead < LEADS) & (o_d < D))


@programs
def _program(
    key: Layout,
    value: Layout,
    query: Layout,
    features: Layout,
    bases: Layout,
    base_key: Layout,
    base_value: Layout,
    temperature: float,
    scale: float,
    share: float,
) -> tuple[Program, int, int]:
    """The program, and where the correction and the mean query are."""
    lead = (max(query.shape[0], key.shape[0]), key.shape[1])
    key, value, query, features, bases, base_key, base_value = (
        _of_heads(layout, lead)
        for layout in (key, value, query, features, bases, base_key, base_value)
    )
    (m, dim), (num_bases, width) = key.shape[-2:], base_value.shape[-2:]
    leads, queries = math.prod(lead), query.shape[-2]
    program = Program(key.device)
    inputs = [program.input(layout) for layout in (key, value, query, features, bases)]
    inputs += [program.input(layout) for layout in (base_key, base_value)]
    options = tiles("moments", key.device)
    block_n, block_r = options.pop("block_n"), tile_for(queries, options.pop("block_r"))
    block_c, block_d = options.pop("block_c"), options.pop("block_d")
    count = triton.cdiv(m, block_n)
    parts = program.memory("parts", (count, leads, dim, width), torch.float32)
    spread = program.memory("spread", (count, leads), torch.float32)
    program.launch(
        _moments_kernel,
        (count * leads,),
        (*inputs, parts, spread),
        (
            m, queries, num_bases, lead[1], features.shape[-1], dim, width,
            *key.strides, *value.strides, *query.strides, *features.strides, *bases.strides,
            *base_key.strides, *base_value.strides, math.log2(math.e) / temperature, NORM_EPS,
        ),
        BLOCK_N=block_n, BLOCK_R=block_r,
        BLOCK_K=tile_for(num_bases, LARGEST_BASES), BLOCK_C=tile_for(features.shape[-1], block_c),
        BLOCK_D=tile_for(dim, block_d), BLOCK_E=tile_for(width, block_d),
        ALIGNED=features.shape[-1] % 8 == dim % 8 == width % 8 == 0
        and aligned(key, value, query, features, bases, base_key, base_value),
        **dot_options(key.dtype), **options,
    )  # fmt: skip
    correction = program.memory("correction", (*lead, dim + 1, width), torch.float32)
    mean = program.memory("mean", (*lead, dim), torch.float32)
    rows = leads * (dim + 1)
    block_r, block_e = block_of_rows(rows), tile_for(width, LARGEST_TILE)
    program.launch(
        _moments_sum_kernel,
        (triton.cdiv(rows, block_r),),
        (parts, spread, correction, mean),
        (count, leads, dim, width, share * scale / m, scale**2 / (queries * m)),
        BLOCK_R=block_r, BLOCK_T=block_of_parts(count, block_r, 1),
        BLOCK_S=block_of_parts(count, block_r, block_e), BLOCK_E=block_e,
        EIGHTS=width % 8 == 0, num_warps=4,
    )  # fmt: skip
    return program, correction.place, mean.place


def _of_heads(layout: Layout, lead: tuple[int, int]) -> Layout:
    """A tensor [B or 1, (1 or h,) n, D] seen as one for every head, [B, h, n, D]."""
    shape, strides = layout.shape, layout.strides
    if len(shape) == 3:
        shape, strides = (shape[0], 1, *shape[1:]), (strides[0], 0, *strides[1:])
    return layout._replace(shape=shape, strides=strides).expanded(*lead, *shape[2:])


def serves(*tensors: torch.Tensor) -> bool:
    """Whether there is a kernel for the operator's tensors.

    Not for float32 on GPUs: products of all bases in full precision would spill registers.
    """
    _, _, key, value, bases, _, _ = tensors
    return (
        all(tensor.numel() > 0 for tensor in tensors)
        and max(key.shape[-1], value.shape[-1]) <= LARGEST_HEAD
        and bases.shape[-2] <= LARGEST_BASES
        and (key.dtype != torch.float32 or interpreted())
    )


@operator
def moments_triton(
    query: torch.Tensor,
    features: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bases: torch.Tensor,
    base_key: torch.Tensor,
    base_value: torch.Tensor,
    temperature: float,
    scale: float,
    share: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.moments`, of tensors that `serves`; no size is 0. Float32 results.

    All but the bases are made to be of the keys' dtype where they are not.
    """
    query, features, value, base_key, base_value = (
        tensor.to(key.dtype) for tensor in (query, features, value, base_key, base_value)
    )
    tensors = (key, value, query, features, bases, base_key, base_value)
    program, *places = _program(*map(Layout.of, tensors), temperature, scale, share)
    found = program(*tensors)
    correction, mean = (found[place] for place in places)
    return correction, mean


torch.library.register_fake("stem_kernels::moments_triton")(moments_output)
