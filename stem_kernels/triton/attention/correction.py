"""What calibrated bases add to attention, on the chip: (query - mean) matrix + a constant.

In half precision both factors are rounded to the input's dtype, once the mean is gone from the
queries; the sum joins the attention's own, in float32. 2 D E FLOPs a query.
"""

from __future__ import annotations

import triton
import triton.language as tl

STEP = tl.constexpr(16)  # channels at a time: a matrix held whole would spill registers


@triton.jit
def corrected(
    b_out, p_query, o_query, m_query, stride_qd, p_matrix, p_mean, D, E,
    START: tl.constexpr, BLOCK_E: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK_E], float32: b_out, the attention's channels from START on, and what is added.

    Args:
        b_out: Attention [rows, BLOCK_E].
        p_query: Queries; they are read again, as registers are dearer than the first cache.
        o_query: Offsets [rows] of the queries' rows.
        m_query: Whether there are such queries, [rows].
        stride_qd: Stride of their channels.
        p_matrix: Correction [D + 1, E] of the head, float32; the last row is the constant.
        p_mean: Mean query [D], float32.
        D: Number of the queries' channels.
        E: Number of the output's.
        START: First channel of b_out.
        BLOCK_E: Number of channels of b_out.
        PRECISION: Precision of products, see `precision.dot_options`.
        UPCAST: Whether products are of float32.
    """
    o_e = START + tl.arange(0, BLOCK_E)
    m_e = o_e < E
    b_out += tl.load(p_matrix + D * E + o_e, mask=m_e, other=0.0)[None, :]
    for channel in tl.range(0, D, STEP, num_stages=1):
        o_d = channel + tl.arange(0, STEP)
        m_d = o_d < D
        # [rows, STEP]
        b_q = tl.load(
            p_query + o_query[:, None] + (o_d * stride_qd)[None, :],
            mask=m_query[:, None] & m_d[None, :], other=0.0,
        )  # fmt: skip
        b_mean = tl.load(p_mean + o_d, mask=m_d, other=0.0)
        b_centred = (b_q.to(tl.float32) - b_mean[None, :]).to(b_q.dtype)
        # [STEP, BLOCK_E]
        b_matrix = tl.load(
            p_matrix + (o_d * E)[:, None] + o_e[None, :],
            mask=m_d[:, None] & m_e[None, :], other=0.0,
        ).to(b_q.dtype)  # fmt: skip
        if UPCAST:
            b_centred, b_matrix = b_centred.to(tl.float32), b_matrix.to(tl.float32)
        b_out = tl.dot(b_centred, b_matrix, b_out, input_precision=PRECISION)
    return b_out
