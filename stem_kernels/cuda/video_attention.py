"""`window_attention` and `video_attention` in the C++ extension's CPU part."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..shared.outputs import attention_output, partial_output
from . import contiguous_rows, enter


def window_attention_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    grid: Sequence[int],
    window: int,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """query, key [B, h, n, d], value [B, h, n, e], on a CPU.

    Returns the float32 output [B, h, n, e] and logsumexp [B, h, n].
    """
    enter("window_attention", query, value, 0)
    found: tuple[torch.Tensor, torch.Tensor] = torch.ops.stem_kernels_ext.window_attention(
        *map(contiguous_rows, (query, key, value)), *grid, _within(grid, window), scale
    )
    return found


def video_attention_cuda(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    assignment: torch.Tensor,
    bases: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    text: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None,
    matrix: torch.Tensor | None,
    grid: Sequence[int],
    window: int,
    scale: float,
) -> torch.Tensor:
    """query, key [B, h, n, d], value [B, h, n, e] and their assignment [B, h, n], on a CPU.

    Args:
        query: Queries.
        key: Keys.
        value: Values.
        assignment: Number of each token's base.
        bases: Mean keys [B, h, K, d], mean values [B, h, K, e] and numbers of tokens [B, h, K] of
            the bases.
        text: Keys [B, h, T, d] and values [B, h, T, e] of the text, and which of them count, bool
            [B, T] or None.
        matrix: Matrix [B, h, d, e] of the correction, for queries times `scale`, or None.
        grid: Frames, height and width.
        window: Places to each side.
        scale: Factor of the logits.

    Returns:
        Contiguous [B, n, h, e] of the query's dtype.
    """
    base_key, base_value, counts = bases
    flags = (text is None, text is None or text[2] is None, matrix is None)
    enter("video_attention", query, value, base_key.shape[-2], flags)
    # Beside each value what it weighs in the softmax's sum, and what of that is a base's.
    mass = counts.float().unsqueeze(-1)
    base_sums = torch.cat([base_value.float() * mass, mass, mass], -1)
    text_key = text_value = bias = None
    if text is not None:
        text_key = text[0].float().contiguous()
        weight = mass.new_tensor([1.0, 0.0]).expand(*text[1].shape[:-1], 2)
        text_value = torch.cat([text[1].float(), weight], -1)
        if text[2] is not None:
            bias = mass.new_zeros(text[2].shape).masked_fill_(~text[2], float("-inf"))
    out: torch.Tensor = torch.ops.stem_kernels_ext.video_attention(
        *map(contiguous_rows, (query, key, value)),
        assignment.to(torch.int32).contiguous(),
        base_key.float().contiguous(),
        base_sums,
        text_key,
        text_value,
        bias,
        None if matrix is None else matrix.float().contiguous(),
        *grid,
        _within(grid, window),
        scale,
    )
    return out


def _within(grid: Sequence[int], window: int) -> int:
    """A window that reaches as far in this video, and is a number of 64 bits."""
    return min(window, grid[1] + grid[2])


torch.library.register_fake("stem_kernels_ext::window_attention")(partial_output)
torch.library.register_fake("stem_kernels_ext::video_attention")(attention_output)
