"""Places of a video's tokens: which of them a window holds, and how many of each base."""

from __future__ import annotations

import math

import torch

Grid = tuple[int, int, int]
"""Frames, height and width of a video in tokens; token (f, y, x) is number (f H + y) W + x."""


def by_place(tensor: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Tokens [G, F H W, d] by place, [G, H, W, F, d]: a view."""
    return tensor.unflatten(1, grid).permute(0, 2, 3, 1, 4)


def by_frame(tensor: torch.Tensor) -> torch.Tensor:
    """The inverse of `by_place`, [G, H, W, F, ...] to [G, F H W, ...]: a copy."""
    return tensor.movedim(3, 1).flatten(1, 3)


def within(window: int, down: int) -> int:
    """How many places to each side a round window reaches, `down` rows above or below its centre.

    A window holds the places at a distance of at most window + 1/2, that is of a square of at most
    window (window + 1): with 1 all nine, with 2 the square of 25 without its corners.
    """
    return math.isqrt(window * (window + 1) - down**2)


def num_places(window: int) -> int:
    """The number of places in a window that no edge cuts."""
    return sum(2 * within(window, down) + 1 for down in range(-window, window + 1))


def window_counts(
    assignment: torch.Tensor, grid: Grid, window: int, num_bases: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How many tokens belong to each base, in the window of each place and in all.

    Counts are whole numbers in float32, exact below 2^24 tokens and added in any order.

    Args:
        assignment: Number of each token's base, integer [G, F H W].
        grid: Frames, height and width.
        window: Places to each side that the window reaches, see `within`.
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
    near = torch.zeros_like(held)
    across: dict[int, torch.Tensor] = {}
    for down in range(-min(window, height - 1), min(window, height - 1) + 1):
        reach = within(window, down)
        if reach not in across:
            across[reach] = _in_row(held, reach)
        seen, seeing = (
            slice(max(0, down), height + min(0, down)),
            slice(max(0, -down), height - max(0, down)),
        )
        near[:, seeing] += across[reach][:, seen]
    return near.flatten(1, 2), total


def _in_row(held: torch.Tensor, reach: int) -> torch.Tensor:
    """Sums [G, H, W, K] over the places of a row that lie within `reach` of each."""
    width = held.shape[2]
    place = torch.arange(width, device=held.device)
    up_to = held.cumsum(2)
    last = up_to.index_select(2, (place + reach).clamp(max=width - 1))
    before = place - reach - 1
    first = up_to.index_select(2, before.clamp(min=0))
    return last - first.masked_fill((before < 0).view(-1, 1), 0.0)
