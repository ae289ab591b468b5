"""One EM pass over narrow tokens, in one kernel: tokens are read once, responsibilities never.

A program holds all K bases and its range of tokens' sums in registers. Logits are made as
[K, BLOCK_N], so that after the softmax over the bases the responsibilities lie as the product with
the tokens wants its left operand: [K, BLOCK_N] x [BLOCK_N, D].

Per (token, base): 4 D FLOPs of matrix work, one exp2, and about five other operations. Floor on an
H100 at D = 40: the exponentials, 16 a clock and SM.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl

from ..precision import dot_options, weight_unit
from ..program import Buffer, Program
from ..tiles import aligned, head_of, in_eights, load_rows, reciprocal, store_rows
from ..tuning import sum_ranges, tile_for, tiles, two_tiles
from .rows import _fused_rows_kernel
from .update import Parts

LARGEST_BASES = 256
LARGEST_TOGETHER = 80  # tokens and payload summed in one program
WIDTHS = (48, 64, 80, 160)  # each has its own row in the tables of tiles


@triton.jit
def _fused_kernel(
    p_features, p_directions, p_values, p_sums, p_value_sums, p_mass,
    n, K, H, tokens_per_split,
    stride_xb, stride_xh, stride_xn, stride_xd, stride_vb, stride_vh, stride_vn, stride_vd, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    D_MAIN: tl.constexpr, D_REST: tl.constexpr, E_MAIN: tl.constexpr, E_REST: tl.constexpr,
    WITH_SUMS: tl.constexpr, WITH_VALUES: tl.constexpr, FULL_K: tl.constexpr,
    ALIGNED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_xn, stride_vn = in_eights(stride_xn, ALIGNED), in_eights(stride_vn, ALIGNED)
    # Only the first axis of a grid may exceed 65,535.
    lead = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    p_base = p_directions + lead * K * D
    # [BLOCK_K, D_MAIN], [BLOCK_K, D_REST]
    b_base = load_rows(p_base, o_k * D, m_k, 1, D, 0, D_MAIN, UPCAST)
    if D_REST > 0:
        b_base_rest = load_rows(p_base, o_k * D, m_k, 1, D, D_MAIN, D_REST, UPCAST)
    # [BLOCK_K]
    b_mass = tl.zeros((BLOCK_K,), dtype=tl.float32)
    # [BLOCK_K, ...]
    if WITH_SUMS:
        b_sums = tl.zeros((BLOCK_K, D_MAIN), dtype=tl.float32)
        if D_REST > 0:
            b_sums_rest = tl.zeros((BLOCK_K, D_REST), dtype=tl.float32)
    if WITH_VALUES:
        b_value_sums = tl.zeros((BLOCK_K, E_MAIN), dtype=tl.float32)
        if E_REST > 0:
            b_value_sums_rest = tl.zeros((BLOCK_K, E_REST), dtype=tl.float32)
    p_x = head_of(p_features, lead, H, stride_xb, stride_xh, ALIGNED)
    p_v = head_of(p_values, lead, H, stride_vb, stride_vh, ALIGNED)
    start = split.to(tl.int64) * tokens_per_split
    o_n = tl.arange(0, BLOCK_N)
    left = tl.minimum(n - start, tokens_per_split).to(tl.int32)
    for offset in range(0, tokens_per_split, BLOCK_N):
        m_n = o_n < left - offset
        p_x_tile = p_x + (start + offset) * stride_xn
        # [BLOCK_N, D_MAIN]
        b_x = load_rows(p_x_tile, o_n * stride_xn, m_n, stride_xd, D, 0, D_MAIN, UPCAST)
        # [BLOCK_K, BLOCK_N]
        b_s = tl.dot(b_base, tl.trans(b_x), input_precision=PRECISION)
        if D_REST > 0:
            b_x_rest = load_rows(
                p_x_tile, o_n * stride_xn, m_n, stride_xd, D, D_MAIN, D_REST, UPCAST
            )
            b_s = tl.dot(b_base_rest, tl.trans(b_x_rest), b_s, input_precision=PRECISION)
        if not FULL_K:
            b_s = tl.where(m_k[:, None], b_s, float("-inf"))
        # [BLOCK_N]
        b_shift = tl.max(b_s, axis=0) * scale
        b_z = tl.exp2(b_s * scale - b_shift[None, :])
        # Tokens past the end have zeros for logits; a share of 0 keeps them out of the mass.
        b_share = tl.where(m_n, UNIT * reciprocal(tl.sum(b_z, axis=0)), 0.0)
        b_z = b_z * b_share[None, :]
        b_mass += tl.sum(b_z, axis=1)
        b_w = b_z.to(p_features.dtype.element_ty)
        if UPCAST:
            b_w = b_w.to(tl.float32)
        if WITH_SUMS:
            b_sums = tl.dot(b_w, b_x, b_sums, input_precision=PRECISION)
            if D_REST > 0:
                b_sums_rest = tl.dot(b_w, b_x_rest, b_sums_rest, input_precision=PRECISION)
        if WITH_VALUES:
            p_v_tile = p_v + (start + offset) * stride_vn
            b_v = load_rows(p_v_tile, o_n * stride_vn, m_n, stride_vd, E, 0, E_MAIN, UPCAST)
            b_value_sums = tl.dot(b_w, b_v, b_value_sums, input_precision=PRECISION)
            if E_REST > 0:
                b_v_rest = load_rows(
                    p_v_tile, o_n * stride_vn, m_n, stride_vd, E, E_MAIN, E_REST, UPCAST
                )
                b_value_sums_rest = tl.dot(
                    b_w, b_v_rest, b_value_sums_rest, input_precision=PRECISION
                )
    row = (split * tl.num_programs(0) + lead) * K
    if WITH_SUMS:
        tl.store(p_mass + row + o_k, b_mass, mask=m_k)
        store_rows(p_sums + row * D, o_k * D, m_k, D, b_sums, 0, D_MAIN)
        if D_REST > 0:
            store_rows(p_sums + row * D, o_k * D, m_k, D, b_sums_rest, D_MAIN, D_REST)
    if WITH_VALUES:
        store_rows(p_value_sums + row * E, o_k * E, m_k, E, b_value_sums, 0, E_MAIN)
        if E_REST > 0:
            store_rows(p_value_sums + row * E, o_k * E, m_k, E, b_value_sums_rest, E_MAIN, E_REST)


def fused_pass(
    program: Program,
    features: Buffer,
    directions: Buffer,
    payload: Buffer | None,
    scale: float,
) -> Parts:
    """Add a pass to a program; how many parts it leaves depends on shapes and device.

    Args:
        program: Program to add it to.
        features: Tokens [B, h, n, D], n >= 1, half precision, any strides that `offsets_fit`.
        directions: Directions [B, h, K, D], contiguous, of the features' dtype.
        payload: Values [B, h, n, E] like the features, or None.
        scale: Factor of the logits, log2(e) / temperature.
    """
    arguments = (program, features, directions, payload, scale)
    widths = [values.layout.shape[-1] for values in (features, payload) if values is not None]
    if payload is not None and max(widths) > LARGEST_TOGETHER:
        # Two sums of [K, D] do not fit, so the responsibilities are made again for the payload.
        alone = _add(program, features, directions, None, scale, "sums")
        return replace(alone, payload=_add(*arguments, "payload").payload)
    return _add(*arguments, "sums" if payload is None else "both")


def _add(
    program: Program,
    features: Buffer,
    directions: Buffer,
    payload: Buffer | None,
    scale: float,
    wanted: str,
) -> Parts:
    tokens, num_bases = features.layout, directions.layout.shape[-2]
    batch, heads, n, dim = tokens.shape
    values = features if payload is None else payload
    width = values.layout.shape[-1]
    padded = next(bound for bound in WIDTHS if max(dim, width) <= bound)
    both = wanted == "both"
    d_main, d_rest = two_tiles(dim)
    as_rows: dict[str, int] = {}
    if wanted == "sums" and padded == WIDTHS[0] and d_main + d_rest > dim > d_main:
        as_rows = tiles(f"em_fused {padded} rows", tokens.device)
    options = as_rows or tiles(f"em_fused {padded}" + (" payload" if both else ""), tokens.device)
    block_n = options.pop("block_n")
    programs = options.pop("programs") // (batch * heads)
    splits, tokens_per_split = sum_ranges(n, block_n, programs)
    lead = (splits, batch, heads, num_bases)
    mass = program.memory("mass parts", lead, torch.float32)
    sums = value_sums = mass
    if wanted != "payload":
        sums = program.memory("parts", (*lead, dim), torch.float32)
    if wanted != "sums":
        value_sums = program.memory("payload parts", (*lead, width), torch.float32)
    block_k = tile_for(num_bases, LARGEST_BASES)
    shared = {
        "BLOCK_N": block_n, "BLOCK_K": block_k, "D_MAIN": d_main, "D_REST": d_rest,
        "FULL_K": block_k == num_bases, "UNIT": weight_unit(tokens.dtype),
        **dot_options(tokens.dtype), **options,
    }  # fmt: skip
    if as_rows:
        program.launch(
            _fused_rows_kernel,
            (batch * heads, splits),
            (features, directions, sums, mass),
            (n, num_bases, heads, tokens_per_split, *tokens.strides, scale),
            D=dim, ALIGNED=aligned(tokens), **shared,
        )  # fmt: skip
        return Parts(sums, mass, None)
    e_main, e_rest = two_tiles(width)
    program.launch(
        _fused_kernel,
        (batch * heads, splits),
        (features, directions, values, sums, value_sums, mass),
        (
            n, num_bases, heads, tokens_per_split,
            *tokens.strides, *values.layout.strides, scale,
        ),
        D=dim, E=width, E_MAIN=e_main, E_REST=e_rest,
        WITH_SUMS=wanted != "payload", WITH_VALUES=wanted != "sums",
        ALIGNED=aligned(tokens, values.layout), **shared,
    )  # fmt: skip
    return Parts(sums, mass, None if wanted == "sums" else value_sums)
