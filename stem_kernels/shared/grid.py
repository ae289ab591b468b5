"""Places of a video's tokens: which of them a window holds, and how many of each base."""

from __future__ import annotations

import torch

Grid = tuple[int, int, int]
"""Frames, height and width of a video in tokens; token (f, y, x) is number (f H + y) W + x."""


def by_place(tensor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tokens [G, F H W, d] by place, [G, H, W, F, d]: a view."""
    return tensor.unflatten(1, grid).permute(0, 2, 3, 1, 4)


def by_frame(tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `by_place`, [G, H, W, F, ...] to [G, F H W, ...]: a copy."""
    return tensor.movedim(3, 1).flatten(1, 3)


def window_counts(
    assignment: torch.Tensor, grid: Grid, window: int, num_bases: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens belong to each base, in the window of each place and in all.

    Counts are whole numbers in float32, exact below 2^24 tokens and added in any order.

    Args:
        assignment: Number of each token's base, integer [G, F H W].
        grid: Frames, height and width.
        window: Places to each side that the window reaches.
        num_bases: Number K of bases.

    Returns:
        float32 [G, H W, K], of the tokens of all frames in the window; and [G, K].
    """
    frames, height, width = grid
    places = height * width
    place = torch.arange(places, device=assignment.device).repeat(frames)
    counts = torch.zeros(
        (assignment.shape[0], places * num_bases), dtype=torch.float32, device=assignment.device
    )
    index = place * num_bases + assignment
    counts.scatter_add_(1, index, torch.ones_like(index, dtype=torch.float32))
    held = counts.view(-1, height, width, num_bases)
    total = held.sum((1, 2))
    for axis in (1, 2):
        held = _within(held, axis, window)
    return held.flatten(1, 2), total


def _within(held: torch.Tensor, axis: int, window: int) -> torch.Tensor:
    """Sums over the places of an axis that lie within `window` of each."""
    size = held.shape[axis]
    place = torch.arange(size, device=held.device)
    up_to = held.cumsum(axis)
    last = up_to.index_select(axis, (place + window).clamp(max=size - 1))
    before = place - window - 1
    first = up_to.index_select(axis, before.clamp(min=0))
    shape = [1] * held.ndim
    shape[axis] = size
    return last - first.masked_fill((before < 0).view(shape), 0.0)
