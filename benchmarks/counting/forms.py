"""Every form in which the suite launches a Triton kernel: shapes, strides, dtypes, with a bias and
without. Tensors are never filled: `launches` computes nothing with them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from stem_kernels import (
    basis_attention,
    blended_attention,
    em_statistics,
    em_update,
    nearest_token,
    soft_em,
)
from stem_kernels.ops.calibration import MOMENTS_TOKENS, moments
from stem_kernels.ops.partial_attention import partial_attention
from stem_kernels.ops.soft_em import attended_bases
from stem_kernels.triton.video.attention import (
    serves,
    video_attention_triton,
    window_attention_triton,
)

from ..cases.em import NUM_BASES
from ..cases.operators import TOKENS

HEADS, FRAMES, CALIBRATED = 8, 32, 128
HEAD_WIDTHS = (40, 64, 80, 160)
AS_WIDE_AS_TILES = 48  # no channel to spare, so that tokens are not rows as at 40
TOO_MANY_BASES = 512  # for all of a head's to stay on the chip
FEATURE_WIDTHS = {320: TOKENS, 640: TOKENS // 4, 1280: TOKENS // 16}
"""Tokens of 32 frames by the channels of SD 1.5's layers."""
MANY_BASES = 1024  # more than a program holds, and as many as EM takes
VIDEO_HEADS, TEXT = 2, 77
VIDEOS = {64: (13, 12, 15), 128: (21, 12, 16)}
"""Small videos by the channels of a head: as many frames as CogVideoX and Wan 2.1 have."""
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Form:
    """A way to call an operator; `name` is the suite's for the cases that it times alone."""

    name: str
    dtype: torch.dtype
    call: Callable[[], object]

    @property
    def dtype_name(self) -> str:
        """The dtype as people write it, such as "float16"."""
        return str(self.dtype).removeprefix("torch.")


def forms(dtype: torch.dtype) -> Iterator[Form]:
    """All of one dtype."""
    for width in HEAD_WIDTHS:
        yield Form(f"em key d={width}", dtype, functools.partial(em_key, width, dtype))
        call = functools.partial(em_key_of_layer, width, dtype)
        yield Form(f"em key d={width} with payload", dtype, call)
    call = functools.partial(em_key, AS_WIDE_AS_TILES, dtype)
    yield Form(f"em key d={AS_WIDE_AS_TILES}", dtype, call)
    for width in FEATURE_WIDTHS:
        yield Form(f"em feature d={width}", dtype, functools.partial(em_feature, width, dtype))
        call = functools.partial(bases_of_layer, width, dtype)
        yield Form(f"bases of a layer d={width}", dtype, call)
        yield Form(f"em update d={width}", dtype, functools.partial(em_update_of_chunks, width))
    call = functools.partial(iterations_with_payload, dtype)
    yield Form("soft_em d=40 with payload", dtype, call)
    for width in HEAD_WIDTHS:
        call = functools.partial(bases_of_keys, width, dtype)
        yield Form(f"bases of a layer's keys d={width}", dtype, call)
    for width in HEAD_WIDTHS:
        call = functools.partial(attention, width, dtype)
        yield Form(f"basis attention d={width}", dtype, call)
        call = functools.partial(attention_of_layer, width, dtype)
        yield Form(f"basis attention d={width} with bias", dtype, call)
        call = functools.partial(blended, width, dtype, with_bias=False)
        yield Form(f"blended attention d={width}", dtype, call)
        call = functools.partial(blended, width, dtype, with_bias=True)
        yield Form(f"blended attention d={width} with bias", dtype, call)
        call = functools.partial(calibrated, width, dtype)
        yield Form(f"calibrated attention d={width}", dtype, call)
        call = functools.partial(partial, width, dtype)
        yield Form(f"partial attention d={width}", dtype, call)
    for width in HEAD_WIDTHS:
        call = functools.partial(moments_of_layer, width, dtype)
        yield Form(f"moments d={width}", dtype, call)
        call = functools.partial(moments_of_keys, width, dtype)
        yield Form(f"moments of keys d={width}", dtype, call)
    call = functools.partial(attention, HEAD_WIDTHS[-1], dtype, TOO_MANY_BASES)
    yield Form(f"basis attention d={HEAD_WIDTHS[-1]} K={TOO_MANY_BASES}", dtype, call)
    for share, width in ((4, 320), (16, 640)):
        call = functools.partial(nearest, TOKENS // share, width, dtype)
        yield Form(f"nearest token n={TOKENS // share}", dtype, call)
    for width in VIDEOS:
        if dtype != torch.float32:  # whose kernels are those of other widths and numbers
            call = functools.partial(em_key, width, dtype, MANY_BASES)
            yield Form(f"em key d={width} K={MANY_BASES}", dtype, call)
            call = functools.partial(nearest, TOKENS // 16, width, dtype)
            yield Form(f"nearest token d={width}", dtype, call)
        call = functools.partial(window, width, dtype)
        yield Form(f"window attention d={width}", dtype, call)
        call = functools.partial(video, width, dtype, with_text=width == 64)
        yield Form(f"video attention d={width}", dtype, call)
    call = functools.partial(video, 128, dtype, with_text=True)
    yield Form("video attention d=128 with text", dtype, call)


def em_key(width: int, dtype: torch.dtype, num_bases: int = NUM_BASES) -> object:
    """Heads one after the other."""
    features, bases = (torch.empty(HEADS, rows, width, dtype=dtype) for rows in (TOKENS, num_bases))
    return em_statistics(features, bases, backend="triton")


def em_key_of_layer(width: int, dtype: torch.dtype) -> object:
    """A layer's keys with its values, heads beside one another."""
    keys, values = (heads_of(1, TOKENS, width, dtype) for _ in range(2))
    bases = torch.empty(1, HEADS, NUM_BASES, width, dtype=dtype)
    return em_statistics(keys, bases, payload=values, backend="triton")


def em_feature(width: int, dtype: torch.dtype, tokens: int | None = None) -> object:
    features = torch.empty(1, tokens or FEATURE_WIDTHS[width], width, dtype=dtype)
    bases = torch.empty(1, NUM_BASES, width, dtype=dtype)
    return em_statistics(features, bases, backend="triton")


def em_update_of_chunks(width: int) -> object:
    """Sums of a layer's features over all chunks of a video."""
    sums, mass = torch.empty(1, NUM_BASES, width), torch.empty(1, NUM_BASES)
    return em_update(sums, mass, sums, num_tokens=TOKENS, backend="triton")


def bases_of_layer(width: int, dtype: torch.dtype) -> object:
    """A layer's features, from tokens to bases and their bias."""
    features = torch.empty(1, FEATURE_WIDTHS[width], width, dtype=dtype)
    return attended_bases(features, NUM_BASES, num_iters=2, proportional=True, backend="triton")


def bases_of_keys(width: int, dtype: torch.dtype) -> object:
    """A layer's keys with its values, heads beside one another."""
    keys, values = (heads_of(1, TOKENS, width, dtype) for _ in range(2))
    return attended_bases(
        keys, NUM_BASES, num_iters=2, payload=values, proportional=True, backend="triton"
    )


def iterations_with_payload(dtype: torch.dtype) -> object:
    features, payload = (torch.empty(HEADS, TOKENS, 40, dtype=dtype) for _ in range(2))
    bases = torch.zeros(HEADS, NUM_BASES, 40)
    return soft_em(features, bases, num_iters=2, payload=payload, empty="zero", backend="triton")


def attention(width: int, dtype: torch.dtype, num_bases: int = NUM_BASES) -> object:
    """A projection's queries, heads beside one another, to bases of a head each."""
    key, value = (torch.empty(1, HEADS, num_bases, width, dtype=dtype) for _ in range(2))
    return basis_attention(heads_of(1, TOKENS, width, dtype), key, value, backend="triton")


def attention_of_layer(width: int, dtype: torch.dtype) -> object:
    """All frames' queries to the projections of one set of bases, weighed by their mass."""
    query = heads_of(FRAMES, TOKENS // FRAMES, width, dtype)
    key, value = (heads_of(1, NUM_BASES, width, dtype) for _ in range(2))
    bias = torch.zeros(1, 1, NUM_BASES)
    return basis_attention(query, key, value, bias=bias, backend="triton")


def calibrated(width: int, dtype: torch.dtype) -> object:
    """The same to bases that are calibrated."""
    query = heads_of(FRAMES, TOKENS // FRAMES, width, dtype)
    key, value = (heads_of(1, NUM_BASES, width, dtype) for _ in range(2))
    return basis_attention(
        query, key, value, bias=torch.zeros(1, 1, NUM_BASES),
        correction=torch.zeros(1, HEADS, width + 1, width),
        query_mean=torch.zeros(1, HEADS, width), backend="triton",
    )  # fmt: skip


def blended(width: int, dtype: torch.dtype, *, with_bias: bool) -> object:
    queries = [heads_of(1, TOKENS, width, dtype) for _ in range(2)]
    keys = [torch.empty(1, HEADS, NUM_BASES, width, dtype=dtype) for _ in range(3)]
    bias = torch.zeros(1, 1, NUM_BASES) if with_bias else None
    return blended_attention(
        queries[0], keys[0], queries[1], keys[1], keys[2], torch.zeros(1, TOKENS), bias=bias,
        backend="triton",
    )  # fmt: skip


def partial(width: int, dtype: torch.dtype) -> object:
    """A calibration's queries to all tokens."""
    query = torch.empty(1, HEADS, CALIBRATED, width, dtype=dtype)
    key, value = (heads_of(1, TOKENS, width, dtype) for _ in range(2))
    return partial_attention(query, key, value, backend="triton")


def moments_of_layer(width: int, dtype: torch.dtype) -> object:
    """Of a layer's features, which its heads share."""
    bases = torch.empty(1, NUM_BASES, HEADS * width)
    return _moments(torch.empty(1, MOMENTS_TOKENS, HEADS * width, dtype=dtype), bases, width)


def moments_of_keys(width: int, dtype: torch.dtype) -> object:
    """Of a layer's keys."""
    bases = torch.empty(1, HEADS, NUM_BASES, width)
    return _moments(heads_of(1, MOMENTS_TOKENS, width, dtype), bases, width)


def _moments(features: torch.Tensor, bases: torch.Tensor, width: int) -> object:
    query, key, value, base_key, base_value = (
        heads_of(1, rows, width, features.dtype)
        for rows in (NUM_BASES, MOMENTS_TOKENS, MOMENTS_TOKENS, NUM_BASES, NUM_BASES)
    )
    return moments(
        query, features, key, value, bases, base_key, base_value, temperature=1.0, backend="triton"
    )


def nearest(tokens: int, width: int, dtype: torch.dtype) -> object:
    """A chunk of 8 frames against two."""
    query, keys = (torch.empty(1, rows, width, dtype=dtype) for rows in (tokens, tokens // 4))
    return nearest_token(query, keys, backend="triton")


def window(width: int, dtype: torch.dtype) -> object:
    """A video's tokens to those near them; nothing where Triton has no kernel."""
    query, key, value = tokens_of(width, dtype)
    if not serves(query, value):
        return None
    return window_attention_triton(query, key, value, list(VIDEOS[width]), 1, width**-0.5)


def video(width: int, dtype: torch.dtype, *, with_text: bool) -> object:
    """The same to bases, too, once it is known which base each token belongs to."""
    query, key, value = tokens_of(width, dtype)
    if not serves(query, value):
        return None
    numbers = torch.zeros(query.shape[:3], dtype=torch.int64)
    text: tuple[torch.Tensor | None, torch.Tensor | None] = None, None
    mask = None
    if with_text:
        text = (heads_of(1, TEXT, width, dtype, VIDEO_HEADS),) * 2
        mask = torch.ones(1, TEXT, dtype=torch.bool)
    return video_attention_triton(
        query, key, value, numbers, *text, mask, list(VIDEOS[width]), 1,
        math.ceil(query.shape[2] / 32), True, width**-0.5,
    )  # fmt: skip


def tokens_of(width: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries, keys and values of a small video."""
    rows = math.prod(VIDEOS[width])
    query, key, value = (heads_of(1, rows, width, dtype, VIDEO_HEADS) for _ in range(3))
    return query, key, value


def heads_of(
    batch: int, rows: int, width: int, dtype: torch.dtype, heads: int = HEADS
) -> torch.Tensor:
    """[batch, h, rows, width] with the heads of a row beside one another."""
    return torch.empty(batch, rows, heads, width, dtype=dtype).transpose(1, 2)
