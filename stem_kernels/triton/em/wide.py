"""One EM pass over wide tokens, such as a layer's features: two matrix products.

The sums [K, D] of one program's tokens do not fit on the chip at D = 320 and above. So a first
kernel writes the responsibilities of a chunk of tokens, in 16 bit, to memory small enough to stay
in the L2 cache mostly; a second one multiplies them with the tokens. Matrix work 4 n K D, the
least there is; the alternatives that keep responsibilities on the chip make all logits again, once
more in all (a pass for the log-sum-exp) or once per slice of the channels.

The responsibilities are rounded to 16 bit for the second product in any case.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..precision import dot_options, weight_unit
from ..program import Buffer, Program
from ..tiles import aligned, head_of, in_eights, load_rows, reciprocal, store_rows
from ..tuning import LARGEST_RANGE, sum_ranges, tile_for, tiles, two_tiles
from .fused import LARGEST_BASES
from .update import Parts

LARGEST_CHUNK_BYTES = 2**25  # of responsibilities


@triton.jit
def _responsibilities_kernel(
    p_features, p_directions, p_z, p_mass,
    n, first, chunk, K, H, stride_xb, stride_xh, stride_xn, stride_xd, scale,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    FULL_K: tl.constexpr, ALIGNED: tl.constexpr, UNIT: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    stride_xn = in_eights(stride_xn, ALIGNED)
    # Only the first axis of a grid may exceed 65,535, so heads and tiles of tokens share it.
    tiles = tl.cdiv(tl.minimum(chunk, n - first), BLOCK_N)
    lead = (tl.program_id(0) // tiles).to(tl.int64)
    tile = tl.program_id(0) % tiles
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    start = tile.to(tl.int64) * BLOCK_N
    m_n = o_n < tl.minimum(chunk - start, n - first - start)
    p_x = head_of(p_features, lead, H, stride_xb, stride_xh, ALIGNED) + (first + start) * stride_xn
    p_base = p_directions + lead * K * D
    # [BLOCK_N, BLOCK_K]
    b_s = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for d in range(0, D, BLOCK_D):
        # [BLOCK_N, BLOCK_D]
        b_x = load_rows(
            p_x + d * stride_xd, o_n * stride_xn, m_n, stride_xd, D - d, 0, BLOCK_D, UPCAST
        )
        # [BLOCK_K, BLOCK_D]
        b_base = load_rows(p_base + d, o_k * D, m_k, 1, D - d, 0, BLOCK_D, UPCAST)
        b_s = tl.dot(b_x, tl.trans(b_base), b_s, input_precision=PRECISION)
    if not FULL_K:
        b_s = tl.where(m_k[None, :], b_s, float("-inf"))
    # [BLOCK_N]
    b_shift = tl.max(b_s, axis=1) * scale
    b_z = tl.exp2(b_s * scale - b_shift[:, None])
    b_share = tl.where(m_n, UNIT * reciprocal(tl.sum(b_z, axis=1)), 0.0)
    b_z = b_z * b_share[:, None]
    p_row = p_z + (lead * chunk + start) * K
    store_rows(p_row, o_n * K, o_n < chunk - start, K, b_z, 0, BLOCK_K)
    # The parts of all chunks, one after the other: [tiles of n, leads, K].
    row = ((first // BLOCK_N + tile) * (tl.num_programs(0) // tiles) + lead) * K
    tl.store(p_mass + row + o_k, tl.sum(b_z, axis=0), mask=m_k)


@triton.jit
def _products_kernel(
    p_z, p_values, p_sums,
    n, first, chunk, K, H, tokens_per_split, stride_vb, stride_vh, stride_vn, stride_vd,
    E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, E_MAIN: tl.constexpr,
    E_REST: tl.constexpr, ADD: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    stride_vn = in_eights(stride_vn, ALIGNED)
    E_TILE: tl.constexpr = E_MAIN + E_REST
    lead = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * E_TILE
    split = tl.program_id(2)
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_k = o_k < K
    row = (split * tl.num_programs(0) + lead) * K
    # [BLOCK_K, E_MAIN], [BLOCK_K, E_REST]
    p_out = p_sums + row * E + e
    if ADD:
        b_sums = load_rows(p_out, o_k * E, m_k, 1, E - e, 0, E_MAIN, False)
    else:
        b_sums = tl.zeros((BLOCK_K, E_MAIN), dtype=tl.float32)
    if E_REST > 0:
        if ADD:
            b_sums_rest = load_rows(p_out, o_k * E, m_k, 1, E - e, E_MAIN, E_REST, False)
        else:
            b_sums_rest = tl.zeros((BLOCK_K, E_REST), dtype=tl.float32)
    p_v = head_of(p_values, lead, H, stride_vb, stride_vh, ALIGNED) + e * stride_vd
    begin = split.to(tl.int64) * tokens_per_split
    for offset in range(0, tokens_per_split, BLOCK_N):
        start = begin + offset
        m_n = o_n < tl.minimum(chunk - start, n - first - start)
        # [BLOCK_N, BLOCK_K]
        b_z = load_rows(p_z + (lead * chunk + start) * K, o_n * K, m_n, 1, K, 0, BLOCK_K, UPCAST)
        p_v_tile = p_v + (first + start) * stride_vn
        b_v = load_rows(p_v_tile, o_n * stride_vn, m_n, stride_vd, E - e, 0, E_MAIN, UPCAST)
        b_sums = tl.dot(tl.trans(b_z), b_v, b_sums, input_precision=PRECISION)
        if E_REST > 0:
            b_v = load_rows(
                p_v_tile, o_n * stride_vn, m_n, stride_vd, E - e, E_MAIN, E_REST, UPCAST
            )
            b_sums_rest = tl.dot(tl.trans(b_z), b_v, b_sums_rest, input_precision=PRECISION)
    store_rows(p_out, o_k * E, m_k, E - e, b_sums, 0, E_MAIN)
    if E_REST > 0:
        store_rows(p_out, o_k * E, m_k, E - e, b_sums_rest, E_MAIN, E_REST)


def wide_pass(
    program: Program,
    features: Buffer,
    directions: Buffer,
    payload: Buffer | None,
    scale: float,
) -> Parts:
    """Add a pass to a program, as `fused.fused_pass` does, in as many parts as suits each."""
    tokens, num_bases = features.layout, directions.layout.shape[-2]
    batch, heads, n, dim = tokens.shape
    leads = batch * heads
    options = tiles("em_wide logits", tokens.device)
    block_n = options.pop("block_n")
    block_d = tile_for(dim, options.pop("block_d"))
    count = triton.cdiv(n, block_n)
    chunk = max(1, LARGEST_CHUNK_BYTES // (2 * num_bases * leads * block_n))
    chunk = min(count, chunk) * block_n
    z = program.memory("responsibilities", (leads, chunk, num_bases), tokens.dtype)
    mass = program.memory("mass parts", (count, batch, heads, num_bases), torch.float32)
    products = [_Products(program, "parts", features, z)]
    if payload is not None:
        products.append(_Products(program, "payload parts", payload, z))
    block_k = tile_for(num_bases, LARGEST_BASES)
    for first in range(0, n, chunk):
        program.launch(
            _responsibilities_kernel,
            (triton.cdiv(min(chunk, n - first), block_n) * leads,),
            (features, directions, z, mass),
            (n, first, chunk, num_bases, heads, *tokens.strides, scale),
            D=dim, BLOCK_N=block_n, BLOCK_K=block_k, BLOCK_D=block_d,
            FULL_K=block_k == num_bases, ALIGNED=aligned(tokens),
            UNIT=weight_unit(tokens.dtype), **dot_options(tokens.dtype), **options,
        )  # fmt: skip
        for product in products:
            product.add(first)
    return Parts(products[0].sums, mass, None if payload is None else products[1].sums)


class _Products:
    """The sums of one kind of values: those of some chunks one after the other, then others."""

    def __init__(self, program: Program, name: str, values: Buffer, z: Buffer) -> None:
        batch, heads, n, width = values.layout.shape
        self.program, self.values, self.z = program, values, z
        self.options = tiles("em_wide products", values.layout.device)
        self.block_n = self.options.pop("block_n")
        self.main, self.rest = two_tiles(min(width, self.options.pop("block_e")))
        self.slices = triton.cdiv(width, self.main + self.rest)
        programs = self.options.pop("programs") // (self.slices * batch * heads)
        _, chunk, num_bases = z.layout.shape
        self.splits, self.tokens_per_split = sum_ranges(chunk, self.block_n, programs)
        self.chunks = max(1, LARGEST_RANGE // self.tokens_per_split)  # of one sum
        self.groups = triton.cdiv(n, chunk * self.chunks)
        size = (self.groups * self.splits, batch, heads, num_bases, width)
        self.sums = program.memory(name, size, torch.float32)

    def add(self, first: int) -> None:
        """Add the products with the responsibilities of the chunk that starts at token `first`."""
        values = self.values.layout
        batch, heads, n, width = values.shape
        _, chunk, num_bases = self.z.layout.shape
        group, before = divmod(first // chunk, self.chunks)
        sums = self.sums
        if self.groups > 1:
            sums = self.program.part(sums, group * self.splits, self.splits)
        self.program.launch(
            _products_kernel,
            (batch * heads, self.slices, self.splits),
            (self.z, self.values, sums),
            (n, first, chunk, num_bases, heads, self.tokens_per_split, *values.strides),
            E=width, BLOCK_N=self.block_n, BLOCK_K=tile_for(num_bases, LARGEST_BASES),
            E_MAIN=self.main, E_REST=self.rest, ADD=before > 0,
            ALIGNED=aligned(values), **dot_options(values.dtype), **self.options,
        )  # fmt: skip
