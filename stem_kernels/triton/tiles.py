"""Reading and writing tiles of rows whose width is no power of two (see `tuning.two_tiles`)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .program import Layout

LARGEST_ROWS = 256


def offsets_fit(tensor: torch.Tensor | Layout) -> bool:
    """Whether offsets inside a tile of up to LARGEST_ROWS of its rows have 32 bits."""
    return LARGEST_ROWS * tensor.stride(-2) + tensor.shape[-1] * tensor.stride(-1) < 2**31


def aligned(*tensors: torch.Tensor | Layout) -> bool:
    """Whether rows are contiguous, and begin at multiples of 8 elements from the first."""
    return all(
        tensor.stride(-1) == 1
        and all(
            size == 1 or stride % 8 == 0
            for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True)
        )
        for tensor in tensors
    )


@triton.jit
def in_eights(stride, ALIGNED: tl.constexpr):
    """`stride`, as a multiple of 8 that the compiler sees where the launcher found it ALIGNED.

    Triton itself notices multiples of 16 alone, which 40 channels are not, and `tl.multiple_of`
    has no effect on an argument. Without it rows are read in pieces of 2 bytes, not 16.
    """
    return stride // 8 * 8 if ALIGNED else stride


@triton.jit
def head_of(p_rows, lead, H, stride_b, stride_h, ALIGNED: tl.constexpr):
    """Where the rows of one head begin, of H heads a batch counted through all batches."""
    stride_b, stride_h = in_eights(stride_b, ALIGNED), in_eights(stride_h, ALIGNED)
    return p_rows + (lead // H) * stride_b + (lead % H) * stride_h


@triton.jit
def load_rows(
    p_tile, o_row, m_row, stride, width,
    START: tl.constexpr, BLOCK: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK]: channels START ... START + BLOCK, zero past the width."""
    o = START + tl.arange(0, BLOCK)
    b = tl.load(
        p_tile + o_row[:, None] + (o * stride)[None, :],
        mask=m_row[:, None] & (o < width)[None, :], other=0.0,
    )  # fmt: skip
    if UPCAST:
        b = b.to(tl.float32)
    return b


@triton.jit
def store_rows(p_tile, o_row, m_row, width, b_tile, START: tl.constexpr, BLOCK: tl.constexpr):
    """The counterpart of `load_rows`, to contiguous rows."""
    o = START + tl.arange(0, BLOCK)
    tl.store(
        p_tile + o_row[:, None] + o[None, :],
        b_tile.to(p_tile.dtype.element_ty),
        mask=m_row[:, None] & (o < width)[None, :],
    )


@triton.jit
def row_max(b_tile):
    """[rows]: the maximum of each row, in 8 chains; one long chain would wait for itself."""
    b_parts = tl.reshape(b_tile, (b_tile.shape[0], b_tile.shape[1] // 8, 8))
    return tl.max(tl.max(b_parts, axis=1), axis=1)


@triton.jit
def row_sum(b_tile):
    """[rows]: the sum of each row, in the order of `row_max`."""
    b_parts = tl.reshape(b_tile, (b_tile.shape[0], b_tile.shape[1] // 8, 8))
    return tl.sum(tl.sum(b_parts, axis=1), axis=1)


@triton.jit
def reciprocal(b):
    """1 / b for float32 b > 0, within 2^-21: two instructions, where a division takes eight."""
    b_root = tl.rsqrt(b)
    return b_root * b_root
