"""Attention to a window of places in all frames and, in the same softmax, to bases and to text.

A program has the queries of a patch of places in all frames or some, and goes through the bases,
and then through the keys of the patch and the border around it, a few frames at a time. What a
query's window holds of these is the same in each frame, so the mask is made once. Weights of bases
count their whole mass; what that is too much is the weight that a token of the window would have as
one of its base, and is taken from the token's own, see `reference.video_attention`. That takes the
product of the queries with the key of each token's base, and no counts by place.

Per (query, base): 2 (d + e) FLOPs, one exp2. Per (query, key of patch and border): 2 (2 d + e)
FLOPs, two exp2; 2 (d + e) and one without bases. Floor on an H100 at d = 128: the matrix units.
"""

from __future__ import annotations

import triton
import triton.language as tl

from ..tiles import in_eights, row_max, row_sum

LEAST = tl.constexpr(-1e30)
"""Least maximum: -inf - -inf is NaN, and all keys of a tile may be left out."""
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def load_numbered(
    p_rows, o_row, stride_n, stride_d, m_row,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """[rows, BLOCK]: rows of these numbers, zero past the width and where m_row is not."""
    o_d = tl.arange(0, BLOCK)
    m = m_row[:, None]
    if WIDTH < BLOCK:
        m = m & (o_d < WIDTH)[None, :]
    if LARGE:
        o_row, o_d = o_row.to(tl.int64), o_d.to(tl.int64)
    b = tl.load(p_rows + (o_row * stride_n)[:, None] + (o_d * stride_d)[None, :], mask=m, other=0.0)
    return b.to(tl.float32) if UPCAST else b


@triton.jit
def _added(
    b_max, b_sum, b_out, b_new, b_w, b_v, PRECISION: tl.constexpr, UPCAST: tl.constexpr
):  # fmt: skip
    """Sum and output once the weights b_w [rows, keys], of the maximum b_new, met their values."""
    b_rescale = tl.exp2(b_max - b_new)
    b_sum = b_sum * b_rescale + row_sum(b_w)
    b_w = b_w.to(b_v.dtype)
    if UPCAST:
        b_w = b_w.to(tl.float32)
    return b_sum, tl.dot(b_w, b_v, b_out * b_rescale[:, None], input_precision=PRECISION)


@triton.jit
def _seen_by_all(
    b_q, b_max, b_sum, b_out, p_key, p_value, p_bias, count,
    stride_kn, stride_kd, stride_vn, stride_vd, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, WITH_BIAS: tl.constexpr, FULL: tl.constexpr, LARGE: tl.constexpr,
    PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum, sum and output after `count` keys more, a multiple of BLOCK_N if FULL."""
    for first in tl.range(0, count, BLOCK_N):
        o_k = first + tl.arange(0, BLOCK_N)
        m_k = tl.full((BLOCK_N,), True, tl.int1) if FULL else o_k < count
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_E]
        b_k = load_numbered(p_key, o_k, stride_kn, stride_kd, m_k, D, BLOCK_D, LARGE, UPCAST)
        b_v = load_numbered(p_value, o_k, stride_vn, stride_vd, m_k, E, BLOCK_E, LARGE, UPCAST)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if WITH_BIAS:
            b_s += tl.load(p_bias + o_k, mask=m_k, other=float("-inf"))[None, :]
        elif not FULL:
            b_s = tl.where(m_k[None, :], b_s, float("-inf"))
        b_new = tl.maximum(tl.maximum(b_max, row_max(b_s)), LEAST)
        b_w = tl.exp2(b_s - b_new[:, None])
        b_sum, b_out = _added(b_max, b_sum, b_out, b_new, b_w, b_v, PRECISION, UPCAST)
        b_max = b_new
    return b_max, b_sum, b_out


@triton.jit
def _seen_nearby(
    b_q, b_max, b_sum, b_bases, b_out, p_key, p_value, p_assignment, p_base_key,
    begin, end, last, o_token, m_place, b_far, frame_tokens,
    stride_kn, stride_kd, stride_vn, stride_vd, scale, key_frames,
    D: tl.constexpr, E: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_E: tl.constexpr, WITH_BASES: tl.constexpr, FULL: tl.constexpr, STAGES: tl.constexpr,
    LARGE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Maximum, sum, the bases' part of it, and output, after the keys of frames begin ... end.

    `o_token` are the tokens of frames 0 ... key_frames, `last` the frame that each would be of in
    the last step and `b_far` the logits' bias, -inf for places out of the window. If not FULL,
    frames past `end` are left out.
    """
    for frame in tl.range(begin, end, key_frames, num_stages=STAGES):
        o_key = frame * frame_tokens + o_token
        m_key = m_place
        b_bias = b_far
        if not FULL:
            m_key = m_key & (last < end)
            b_bias += tl.where(last < end, 0.0, float("-inf"))[None, :]
        # [BLOCK_N, BLOCK_D], [BLOCK_N, BLOCK_E]
        b_k = load_numbered(p_key, o_key, stride_kn, stride_kd, m_key, D, BLOCK_D, LARGE, UPCAST)
        b_v = load_numbered(p_value, o_key, stride_vn, stride_vd, m_key, E, BLOCK_E, LARGE, UPCAST)
        # [BLOCK_M, BLOCK_N]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale + b_bias
        b_new = tl.maximum(tl.maximum(b_max, row_max(b_s)), LEAST)
        b_w = tl.exp2(b_s - b_new[:, None])
        if WITH_BASES:
            # No more than the base's own weight, so the maximum is beyond it already.
            o_base = tl.load(p_assignment + o_key, mask=m_key, other=0)
            b_c = load_numbered(p_base_key, o_base, D, 1, m_key, D, BLOCK_D, LARGE, UPCAST)
            b_t = tl.dot(b_q, tl.trans(b_c), input_precision=PRECISION) * scale + b_bias
            b_t = tl.exp2(b_t - b_new[:, None])
            b_bases = b_bases * tl.exp2(b_max - b_new) - row_sum(b_t)
            b_w -= b_t
        b_sum, b_out = _added(b_max, b_sum, b_out, b_new, b_w, b_v, PRECISION, UPCAST)
        b_max = b_new
    return b_max, b_sum, b_bases, b_out


@triton.jit
def _queries(o_m, first_frame, top, left, F, ROWS, COLUMNS, patch_rows, patch_columns, frames):
    """Row, column and number of a patch's queries, by place and then by frame; which there are."""
    # Those past the patch are its last place's.
    o_place = tl.minimum(o_m // frames, patch_rows * patch_columns - 1)
    o_frame = first_frame + o_m % frames
    o_y = top + o_place // patch_columns
    o_x = left + o_place % patch_columns
    m = (o_m < frames * patch_rows * patch_columns) & (o_frame < F)
    m = m & (o_y < ROWS) & (o_x < COLUMNS)
    o_y, o_x = tl.minimum(o_y, ROWS - 1), tl.minimum(o_x, COLUMNS - 1)
    return o_y, o_x, (o_frame * ROWS + o_y) * COLUMNS + o_x, m


@triton.jit
def window_attention_kernel(
    p_query, p_key, p_value, p_assignment, p_base_key, p_base_value, p_base_bias,
    p_text_key, p_text_value, p_text_bias, p_matrix, p_out, p_logsumexp,
    F, ROWS, COLUMNS, H, K, T, down, across, farthest,
    patch_rows, patch_columns, query_frames, key_frames,
    patches, frame_tiles, column_tiles, parts,
    stride_qb, stride_qh, stride_qn, stride_qd, stride_kb, stride_kh, stride_kn, stride_kd,
    stride_vb, stride_vh, stride_vn, stride_vd, stride_ob, stride_oh, stride_on,
    stride_tb, stride_th, stride_tn, stride_td, stride_ub, stride_uh, stride_un, stride_ud, scale,
    D: tl.constexpr, E: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_E: tl.constexpr,
    WITH_BASES: tl.constexpr, WITH_TEXT: tl.constexpr, MASKED: tl.constexpr,
    CORRECTED: tl.constexpr, LOGSUMEXP: tl.constexpr, TAIL: tl.constexpr, STEP: tl.constexpr,
    ALIGNED: tl.constexpr, LARGE: tl.constexpr, PRECISION: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qh = in_eights(stride_qb, ALIGNED), in_eights(stride_qh, ALIGNED)
    stride_kb, stride_kh = in_eights(stride_kb, ALIGNED), in_eights(stride_kh, ALIGNED)
    stride_vb, stride_vh = in_eights(stride_vb, ALIGNED), in_eights(stride_vh, ALIGNED)
    stride_qn, stride_kn = in_eights(stride_qn, ALIGNED), in_eights(stride_kn, ALIGNED)
    stride_vn, stride_on = in_eights(stride_vn, ALIGNED), in_eights(stride_on, ALIGNED)
    # Only the first axis of a grid may exceed 65,535, so heads and patches share it.
    lead = (tl.program_id(0) // patches).to(tl.int64)
    patch = tl.program_id(0) % patches
    batch, head = lead // H, lead % H
    first_frame = patch % frame_tiles * query_frames
    patch = patch // frame_tiles
    top = patch // column_tiles * patch_rows
    left = patch % column_tiles * patch_columns
    p_query += batch * stride_qb + head * stride_qh
    p_key += batch * stride_kb + head * stride_kh
    p_value += batch * stride_vb + head * stride_vh
    # [BLOCK_M]
    o_m = tl.arange(0, BLOCK_M)
    o_y, o_x, o_query, m_m = _queries(
        o_m, first_frame, top, left, F, ROWS, COLUMNS, patch_rows, patch_columns, query_frames
    )
    # [BLOCK_M, BLOCK_D]
    b_q = load_numbered(p_query, o_query, stride_qn, stride_qd, m_m, D, BLOCK_D, LARGE, UPCAST)
    # [BLOCK_M]
    b_max = tl.full((BLOCK_M,), LEAST, dtype=tl.float32)
    b_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    # [BLOCK_M, BLOCK_E]
    b_out = tl.zeros((BLOCK_M, BLOCK_E), dtype=tl.float32)
    if WITH_TEXT:
        b_max, b_sum, b_out = _seen_by_all(
            b_q, b_max, b_sum, b_out,
            p_text_key + batch * stride_tb + head * stride_th,
            p_text_value + batch * stride_ub + head * stride_uh, p_text_bias + batch * T, T,
            stride_tn, stride_td, stride_un, stride_ud, scale, D, E, BLOCK_K, BLOCK_D, BLOCK_E,
            MASKED, False, LARGE, PRECISION, UPCAST,
        )  # fmt: skip
    b_bases = b_sum
    if WITH_BASES:
        p_assignment += lead * (F * ROWS * COLUMNS)
        p_base_key += lead * K * D
        b_before = b_max
        b_max, b_sum, b_out = _seen_by_all(
            b_q, b_max, b_sum, b_out, p_base_key, p_base_value + lead * K * E,
            p_base_bias + lead * K, K, D, 1, E, 1, scale, D, E, BLOCK_K, BLOCK_D, BLOCK_E,
            True, True, False, PRECISION, UPCAST,
        )  # fmt: skip
        b_bases = b_sum - b_bases * tl.exp2(b_before - b_max)
    # The keys of the patch and its border, by frame and then by place; where these are too many
    # for a tile, by frame alone, a part of the places after the other.
    key_columns = patch_columns + 2 * across
    key_places = (patch_rows + 2 * down) * key_columns
    whole = F // key_frames * key_frames
    for part in tl.range(0, parts, num_stages=1):
        # [BLOCK_N]
        o_place = part * BLOCK_N + tl.arange(0, BLOCK_N)
        o_frame = o_place // key_places
        m_n = o_place < key_frames * key_places
        o_place = o_place % key_places
        o_key_y = top - down + o_place // key_columns
        o_key_x = left - across + o_place % key_columns
        m_n = m_n & (o_key_y >= 0) & (o_key_y < ROWS) & (o_key_x >= 0) & (o_key_x < COLUMNS)
        o_token = (o_frame * ROWS + o_key_y) * COLUMNS + o_key_x
        # [BLOCK_M, BLOCK_N]
        o_down, o_across = o_y[:, None] - o_key_y[None, :], o_x[:, None] - o_key_x[None, :]
        m_near = (o_down * o_down + o_across * o_across <= farthest) & m_n[None, :]
        b_far = tl.where(m_near, 0.0, float("-inf"))
        b_max, b_sum, b_bases, b_out = _seen_nearby(
            b_q, b_max, b_sum, b_bases, b_out, p_key, p_value, p_assignment, p_base_key,
            0, whole, o_frame, o_token, m_n, b_far, ROWS * COLUMNS,
            stride_kn, stride_kd, stride_vn, stride_vd, scale, key_frames, D, E, BLOCK_N, BLOCK_D,
            BLOCK_E, WITH_BASES, True, None, LARGE, PRECISION, UPCAST,
        )  # fmt: skip
        if TAIL:
            b_max, b_sum, b_bases, b_out = _seen_nearby(
                b_q, b_max, b_sum, b_bases, b_out, p_key, p_value, p_assignment, p_base_key,
                whole, F, whole + o_frame, o_token, m_n, b_far, ROWS * COLUMNS,
                stride_kn, stride_kd, stride_vn, stride_vd, scale, key_frames, D, E, BLOCK_N,
                BLOCK_D, BLOCK_E, WITH_BASES, False, 1, LARGE, PRECISION, UPCAST,
            )  # fmt: skip
    b_out = b_out / b_sum[:, None]
    if CORRECTED:
        b_share = b_bases / b_sum
        p_matrix += lead * D * E
        for d in tl.range(0, D, STEP, num_stages=1):
            o_d = tl.arange(0, STEP)
            o_row = o_query.to(tl.int64) if LARGE else o_query
            # [BLOCK_M, STEP], [STEP, BLOCK_E]
            b_x = tl.load(
                p_query + (o_row * stride_qn)[:, None] + ((d + o_d) * stride_qd)[None, :],
                mask=m_m[:, None] & (o_d < D - d)[None, :], other=0.0,
            )  # fmt: skip
            b_matrix = load_numbered(
                p_matrix + d * E, o_d, E, 1, o_d < D - d, E, BLOCK_E, False, UPCAST
            )
            b_x = (b_x.to(tl.float32) * b_share[:, None]).to(b_x.dtype)
            if UPCAST:
                b_x = b_x.to(tl.float32)
            b_out = tl.dot(b_x, b_matrix, b_out, input_precision=PRECISION)
    p_out += batch * stride_ob + head * stride_oh
    # Once: in a loop the places are worked out again, which takes fewer registers.
    for first in tl.range(0, query_frames * patch_rows * patch_columns, BLOCK_M, num_stages=1):
        _, _, o_out, m_out = _queries(
            first + o_m, first_frame, top, left, F, ROWS, COLUMNS, patch_rows, patch_columns,
            query_frames,
        )  # fmt: skip
        if LOGSUMEXP:
            p_log = p_logsumexp + lead * (F * ROWS * COLUMNS)
            tl.store(p_log + o_out, (b_max + tl.log2(b_sum)) * LN2, mask=m_out)
        o_e = tl.arange(0, BLOCK_E)
        m_out = m_out[:, None]
        if E < BLOCK_E:
            m_out = m_out & (o_e < E)[None, :]
        if LARGE:
            o_out = o_out.to(tl.int64)
        tl.store(
            p_out + (o_out * stride_on)[:, None] + o_e[None, :],
            b_out.to(p_out.dtype.element_ty), mask=m_out,
        )  # fmt: skip
