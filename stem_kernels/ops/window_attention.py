"""Exact attention of a video's tokens to a window of places in all frames."""

from __future__ import annotations

import torch

from ..reference.window_attention import window_attention_torch
from ..shared.grid import Grid
from ..verification import run, video
from ..verification.comparison import Comparison
from .checks import check_floating, check_same_dtype, check_width
from .partial_attention import ROUNDING_ATOL, PartialAttention

OP = "window_attention"


def window_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    *,
    window: int = 2,
    scale: float | None = None,
    backend: str = "auto",
) -> PartialAttention:
    r"""Attention of each token to the tokens within `window` places of its own, in all frames.

    A token at row y and column x attends to all tokens (f', y', x') at a distance of at most window
    + 1/2 places, in F frames; with 1 these are 9 places, with 2 the 21 of a square without its
    corners, fewer at the edges. This is equivalent to the following, but never holds the weights
    `[B, h, n, n]`:

        f, y, x = torch.unravel_index(torch.arange(n), grid)
        near = (y[:, None] - y) ** 2 + (x[:, None] - x) ** 2 <= (window + 0.5) ** 2
        logits = (query @ key.mT * scale).masked_fill(~near, -torch.inf)
        return torch.softmax(logits, -1) @ value, torch.logsumexp(logits, -1)

    With the second result it is merged with attention to other keys, see `merged_attention`.

    Args:
        query: Queries [B, h, n, d], any strides; n = F H W tokens, frame after frame and row after
            row.
        key: Keys [B, h, n, d] of the same dtype.
        value: Values [B, h, n, e] of the same dtype.
        grid: Frames F, height H and width W of the video, in tokens.
        window: Number of places to each side, at least 0.
        scale: Factor of the logits; 1 / sqrt(d) if None.
        backend: Name of the backend, "auto", "triton", "cuda" or "torch". The extension ("cuda")
            has a kernel for CPUs. Plain torch computes what that and Triton have none for: more
            than 128 channels on GPUs, AMD's GPUs, and "cuda" on a GPU.

    Returns:
        `PartialAttention` in float32 (float64 for float64 input). Plain torch takes a copy of a
        head's operands and at most 512 KiB of logits on a CPU (16 MiB elsewhere, or those of one
        place if that is more), the extension a copy of a head's keys and values, and Triton
        nothing. Equal calls give equal bits.

    Raises:
        ValueError, TypeError: shapes, dtypes or values that do not fit.
        BackendError: the backend asked for cannot run this call.

    Source: this package's.
    """
    check_video(OP, query, key, value, grid, window)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query, key, value, list(grid), window, scale)

    def on(chosen: str) -> PartialAttention:
        if chosen == "triton":
            from ..triton.video.attention import serves, window_attention_triton

            if serves(query, value):
                return PartialAttention(*window_attention_triton(*arguments))
        if chosen == "cuda" and query.device.type == "cpu":
            from ..cuda.video_attention import window_attention_cuda

            return PartialAttention(*window_attention_cuda(*arguments))
        return PartialAttention(*window_attention_torch(query, key, value, grid, window, scale))

    def check(found: PartialAttention, _: str) -> list[Comparison] | None:
        return video.window_attention(found, *arguments, ROUNDING_ATOL)

    return run(OP, backend, {"query": query, "key": key, "value": value}, 0, on, check)


def check_video(
    op: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Grid,
    window: int,
) -> None:
    """Raise the error that a caller should see where these are not tokens of one such video."""
    check_floating(op, query=query, key=key, value=value)
    check_same_dtype(op, query=query, key=key, value=value)
    fits = (
        query.ndim == 4
        and key.shape == query.shape
        and value.ndim == 4
        and value.shape[:3] == query.shape[:3]
        and min(query.shape[:2]) >= 1
    )
    if not fits:
        raise ValueError(
            f"{op}: query and key must be [B, h, n, d] and value [B, h, n, e], B and h at least 1; "
            f"they are {list(query.shape)}, {list(key.shape)} and {list(value.shape)}"
        )
    check_width(op, "query", query)
    whole = len(grid) == 3 and all(type(size) is int and size >= 1 for size in grid)
    if not whole or grid[0] * grid[1] * grid[2] != query.shape[2]:
        raise ValueError(
            f"{op}: grid is {tuple(grid)}; it must be the frames, height and width of the video in "
            f"tokens, each at least 1, whose product is the {query.shape[2]} tokens of query"
        )
    if type(window) is not int or window < 0:
        raise ValueError(f"{op}: window is {window!r}; it must be a whole number of at least 0")
